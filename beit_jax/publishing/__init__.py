"""An export on the hub: `beit-jax export ... --push OWNER/NAME`.

`options` is what the command line asks, `card` the model card, `push` the repository: what is checked before anything
is uploaded, and the upload. May import: the ground, weights, and `beit_jax.programs`.
"""
