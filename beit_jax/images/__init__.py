"""Images in: files, PIL images and arrays to ``pixel_values``, as the references prepare them; label maps.

`files` opens an image, `preprocessor_config` reads what a checkpoint says about images, `processor` computes
``pixel_values``, `label_maps` reads and writes a class for every pixel. May import: the ground. Imports no JAX.
"""

from beit_jax.images.files import open_image
from beit_jax.images.processor import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageProcessor,
    Within,
    ade20k_processor,
    preset,
)

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageProcessor",
    "Within",
    "ade20k_processor",
    "open_image",
    "preset",
]
