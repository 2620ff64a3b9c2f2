"""The costs of a training step, before and after it is compiled.

`estimate` computes FLOPs and memory from shapes and traces; `work` adds up a compiled program,
whose text `hlo` reads.

May import: `beit_jax.models`, the ground.
"""
