"""Training: recipes, data, objectives, one sharded loop, and evaluation. Reads and writes native checkpoints.

`recipes` names the published runs, `recipe` what a run consists of; `plan` resolves one against data, checkpoint and
devices, `loop` carries it out. Needs ``pip install 'beit-jax[train]'``.
"""
