"""Images: files, PIL images and arrays to ``pixel_values``, computed as the references do; and label maps.

`files` opens images and uses the checks of their `containers` and what `libtiff` notices; `bands` reads images of any
number of bands, with `tiff` and `array_files`; `listing` finds images below a folder, `bad_images` counts those that
cannot be read, `preprocessor_config` reads the image settings of a checkpoint, `processor` computes ``pixel_values``
with the arithmetic of `scaling`, `label_maps` reads and writes a class number for every pixel, `mask_classes` and
`class_files` say what the numbers or colours of masks mean. May import: the ground. Imports no JAX.
"""

from beit_jax.images.files import decode_image, open_image
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
    "decode_image",
    "open_image",
    "preset",
]
