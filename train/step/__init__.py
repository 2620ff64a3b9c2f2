"""One optimizer step: a pure function from state and batch to state and metrics.

`state` is what it reads and writes, `objective` what it calls for the loss, `optim` and `schedule` how parameters move. May
import: the ground and models of `beit_jax`, `..recipe`.
"""
