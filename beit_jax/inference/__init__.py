"""Inference: from a checkpoint and images to labels, features and label maps.

`predict` holds the public functions for labels and features, `segmentation` those for label maps. `reading` loads a
checkpoint of any format, `saving` writes a live model as a native one. `predictor` makes labels and features of images
by a given forward pass, `program_cache` stores traced programs for the next process. May import: the ground, `images`,
`weights`, `kernels.cpu`, `models`, and `beit_jax.convert` for a checkpoint that is not native.
"""
