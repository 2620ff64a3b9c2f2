"""PEFT's adapters, LoRA and DoRA: read onto a base, and written from what `beit-jax train --adapter.rank` keeps.

`written` makes PEFT's files of a native checkpoint and the factors beside it.
May import: the ground, weights, models, `beit_jax.adapters`, `..files`, `..formats`.
"""
