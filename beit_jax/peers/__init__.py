"""This library beside its peers: the same forward pass by transformers, timm and engines, each in a process of its own.

`needs` names the contenders and what must be installed for each: the peers are optional, imported in functions, and
what is missing is left out and named. `job` is what a process is told to compute, `forward` the table of
implementations, of which `by_torch` has those of torch and `engines` those that read ONNX. `process` is the process's
side of a race, `race` the side that starts them and lets them take turns. `same_model` writes one model in the layout
of each. `bench` is all of it, for `beit-jax bench`.

May import: the ground, `images`, `weights`, `kernels.cpu`, `models`, `inference`, `beit_jax.convert` for other layouts,
and `beit_jax.train.distributed` for a mesh.
"""
