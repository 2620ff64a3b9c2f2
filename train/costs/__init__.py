"""The costs of a training step, before and after it is compiled.

`estimate` computes FLOPs and memory from shapes and traces; `hlo` reads the work of a compiled program from its text.

May import: `beit_jax.models`, the ground.
"""
