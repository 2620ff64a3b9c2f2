"""The visual tokenizers of pre-training, as Flax modules, and their native checkpoints.

`interface` says what pre-training needs of a tokenizer. `dvae` is DALL-E's tokenizer, `vqkd` is BEiT v2's. `build`
makes the tokenizer of a configuration, `configs`; `checkpoint` reads and writes native checkpoints.

May import: the ground (the modules directly in `beit_jax`), `beit_jax.weights`, `beit_jax.models`.
"""
