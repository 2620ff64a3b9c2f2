"""Training checkpoints that are what was saved, or are not there.

`checkpointer` saves and restores, `snapshot` moves arrays, `digests` is the manifest, `step_files` the names.
May import: the ground of `beit_jax`, `..distributed`.
"""
