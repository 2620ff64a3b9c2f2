"""scikit-learn's handwritten digits as a data set to prepare."""

import io
from typing import Final

import numpy as np
from PIL import Image

from beit_jax.errors import BeitJaxError

from .sources import Example, Source, Split, classification_features

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits() -> Source:
    """scikit-learn's handwritten digits: 1797 greyscale images of 8x8 pixels, in ten classes.

    A quarter, stratified by class, is the split "validation". The pixels (0..16 scaled to 0..255) and the split are
    those the checkpoint inside this package was trained and tested with (tests/reference/make_digits.py).

    Raises:
        BeitJaxError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise BeitJaxError("digits: scikit-learn holds them and is not installed; pip install scikit-learn") from None
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(range(len(pixels)), test_size=0.25, random_state=0, stratify=data.target)

    def example(index: int) -> Example:
        buffer = io.BytesIO()
        Image.fromarray(pixels[index]).save(buffer, format="PNG")
        return {"image": buffer.getvalue(), "label": int(data.target[index]), "file_name": f"digit_{index:04d}.png"}

    splits = {
        name: Split(len(part), map(example, part)) for name, part in zip(("train", "validation"), parts, strict=True)
    }
    description = "Handwritten digits of UCI's optical recognition set, as scikit-learn has them."
    return Source("digits", description, DIGITS, classification_features(DIGITS), splits, len(pixels) * 512)
