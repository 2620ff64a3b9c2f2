"""Many devices and many processes.

`topology` describes TPU chips and slices; `sharding` says where arrays lie on a mesh; `collectives` exchanges small
values; `peers` watches the other processes of a run; `cluster` joins them.

May import: `train.recipe`, `beit_jax.models.partition`, the ground.
"""
