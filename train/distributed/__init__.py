"""Many devices and many processes.

`chips` and `cards` are the data sheets of TPUs and GPUs; `topology` makes slices and machines of them; `sharding` says
where arrays lie on a mesh; `collectives` exchanges small values; `peers` watches the other processes of a run;
`cluster` joins them.

May import: `train.recipe`, `beit_jax.models.partition`, the ground.
"""
