"""Training: recipes, data, objectives, one sharded loop, and evaluation. Reads and writes native checkpoints.

`recipe` is what every run has; its rooms, from the ground up, are costs, distributed, checkpoints, augmentation, data,
evaluation, initial, step, objectives, recipes, loop and forecast. Needs ``pip install 'beit-jax[train]'``. May import:
the library (`beit_jax`), never `beit_jax.convert`: training reads native checkpoints.
"""
