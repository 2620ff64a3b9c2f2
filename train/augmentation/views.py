"""Images of pre-training on the host: a crop as the student sees it, as the tokenizer sees it, and the mask.

Source: microsoft/unilm@768a3c8 beit/datasets.py and beit/transforms.py. Nothing here imports JAX.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from PIL import Image

from ..recipe import CropOptions
from .classification import RESAMPLES, Draws, draw_box, draw_jitter
from .decode import Pixels
from .masking import BlockMask
from .randaugment import perform
from .resample import Colour, resized

Views: TypeAlias = dict[str, np.ndarray]

_NO_FILL: Final[Colour] = (0, 0, 0)  # colour jitter needs no pixels from outside the image


@dataclass(frozen=True)
class ViewsTransform:
    """Image ([h, w, c] uint8 or float32, or PIL's) and generator -> views of the image.

    The transform is a plain value, so that it can be sent to worker processes. The views are:

    - "image": [h, w, c], the student's view of `size` (height, width), resized by `options.interpolation`;
    - "token_image": [th, tw, c], the tokenizer's view of `token_size`, resized by `token_interpolation`; it is
      the same crop of the same jittered and flipped image. Missing without a `token_size`;
    - "mask": bool [patches], row-major, True where a patch is hidden. Missing without a `mask`.

    The student's view does not depend on whether there are a second view and a mask.
    """

    options: CropOptions
    size: tuple[int, int]
    token_size: tuple[int, int] | None
    token_interpolation: Literal["bicubic", "lanczos"]
    mask: BlockMask | None

    def __call__(self, image: Pixels | Image.Image, rng: np.random.Generator) -> Views:
        pixels = np.asarray(image)
        height, width, _ = pixels.shape
        views = self.apply(pixels, self.draw((width, height), rng))
        if self.mask is not None:
            views["mask"] = self.mask(rng)
        return views

    def draw(self, image_size: tuple[int, int], rng: np.random.Generator) -> Draws:
        """Draws the random choices for an image of (width, height). The box belongs to the flipped image."""
        options = self.options
        operations = draw_jitter(options.color_jitter, rng)
        flip = rng.random() < options.flip
        box = draw_box(image_size, options.crop_scale, options.crop_ratio, rng)
        resamples = RESAMPLES[options.interpolation]
        return Draws(box, resamples[rng.integers(len(resamples))], flip, operations)

    def apply(self, image: Pixels | Image.Image, draws: Draws) -> Views:
        """Applies the random choices.

        Colours come first, because contrast is relative to the mean of the whole image. Then the image is flipped,
        cropped and resized, in the order of the original: pixels outside the crop do not reach its edges.
        """
        pixels = np.asarray(image)
        if draws.operations:
            picture = Image.fromarray(pixels)
            for operation in draws.operations:
                picture = perform(picture, operation, _NO_FILL)
            pixels = np.asarray(picture)
        left, top, right, bottom = draws.box
        crop = (pixels[:, ::-1] if draws.flip else pixels)[top:bottom, left:right]
        whole = (0, 0, right - left, bottom - top)
        views = {"image": resized(crop, whole, self.size, draws.resample)}
        if self.token_size is not None:
            (resample,) = RESAMPLES[self.token_interpolation]
            views["token_image"] = resized(crop, whole, self.token_size, resample)
        return views
