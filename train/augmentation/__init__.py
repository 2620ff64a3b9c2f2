"""Training images: decoded, cropped, changed and mixed, on the host and on the device; masks of patches.

May import: the ground and images of `beit_jax`, `..recipe`.
"""
