"""Visual tokenizers: DALL-E's `dvae`, BEiT v2's `vqkd`, and `tokenizer`, their interface and native checkpoints.

May import: the ground, `beit_jax.models`, `beit_jax.weights`.
"""
