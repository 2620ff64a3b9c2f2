"""Many devices and hosts: who belongs to a run, what they tell each other, where arrays lie.

`topology` names chips and slices, `sharding` places arrays on a mesh, `collectives` exchanges small values, `peers` watches
the other processes, `cluster` joins them. May import: the ground and models of `beit_jax`, `..recipe`.
"""
