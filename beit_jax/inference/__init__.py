"""From a checkpoint and images to labels, features and label maps.

`reading` takes a checkpoint of any format, `predict` and `segmentation` are the public functions, `predictor` what they do
with any forward pass, `program_cache` keeps traced programs for the next process. May import: the ground, images, weights,
models, and `beit_jax.convert` when a checkpoint is not a native one.
"""
