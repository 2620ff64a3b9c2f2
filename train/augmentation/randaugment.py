"""RandAugment: the operations that an image gets, and their effect on its pixels, exactly as Pillow computes it.

Source of the semantics: timm 0.3.2 to 1.0.31, timm/data/auto_augment.py; operations are named as there.
"""

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from beit_jax.errors import BeitJaxError, printable

from .resample import Colour, Resampling, slide
from .smooth import smooth

OPERATIONS: Final = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
UNIFORM_BEYOND: Final = 100.0  # with a larger deviation, levels are uniform between 0 and the magnitude
_PARTS: Final = {  # the parts of the notation, and patterns of their values
    "n": "[1-9][0-9]*",
    "m": "[0-9]+",
    "mstd": r"[0-9]+(\.[0-9]+)?",
    "mmax": "[1-9][0-9]*",
    "inc": "[01]",
    "p": r"0(\.[0-9]+)?|1(\.0+)?",
}
_ENHANCERS: Final = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
}


@dataclass(frozen=True)
class Operation:
    """One of OPERATIONS, with the values that were drawn for it.

    Attributes:
        argument: degrees, bits to keep, threshold, addend, enhancement factor, shear or share of the side; 0 for
            operations without an argument.
        resample: the filter of operations that move pixels.
    """

    name: str
    argument: float
    resample: Resampling = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class RandAugment:
    """A policy: `count` operations are drawn uniformly, with replacement; each is carried out with probability `share`.

    The level of an operation is normal with mean `magnitude` and standard deviation `deviation`, clipped to
    [0, `limit`]. With `increasing`, higher levels are stronger for all operations.
    """

    count: int = 2
    magnitude: int = 10
    deviation: float = 0.0
    limit: int = 10
    increasing: bool = False
    share: float = 0.5

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """The policy that timm's notation describes, such as "rand-m9-mstd0.5-inc1".

        Parts, in any order: n (count), m (magnitude), mstd (deviation), mmax (limit), inc (1 or 0), p (share).

        Raises:
            BeitJaxError: another or a repeated part, or a value out of its range.
        """
        head, *parts = text.split("-")
        if head != "rand":
            raise _refused(text, text)
        given = dict[str, str]()
        for part in parts:
            name = part.rstrip("0123456789.")
            value = part.removeprefix(name)
            if name not in _PARTS or name in given or not re.fullmatch(_PARTS[name], value):
                raise _refused(text, part)
            given[name] = value
        return cls(
            count=int(given.get("n", cls.count)),
            magnitude=int(given.get("m", cls.magnitude)),
            deviation=float(given.get("mstd", cls.deviation)),
            limit=int(given.get("mmax", cls.limit)),
            increasing=given.get("inc") == "1",
            share=float(given.get("p", cls.share)),
        )

    def draw(self, rng: np.random.Generator, resamples: tuple[Resampling, ...]) -> tuple[Operation, ...]:
        """Draws the operations of one image. Each uses one of `resamples`, with equal probability."""
        drawn = []
        for number in rng.integers(len(OPERATIONS), size=self.count):
            if rng.random() >= self.share:
                continue
            level = self._level(rng)
            amount = argument(OPERATIONS[number], level, rng.random() < 0.5, increasing=self.increasing)
            drawn.append(Operation(OPERATIONS[number], amount, resamples[rng.integers(len(resamples))]))
        return tuple(drawn)

    def _level(self, rng: np.random.Generator) -> float:
        if self.deviation > UNIFORM_BEYOND:
            level = rng.uniform(0.0, self.magnitude)
        else:
            level = rng.normal(self.magnitude, self.deviation)
        return min(max(level, 0.0), float(self.limit))


def argument(name: str, level: float, negative: bool, *, increasing: bool) -> float:
    """The argument of the operation at a level; `negative` mirrors the arguments that have two directions.

    With `increasing`, up to level 10: Rotate -30 to 30; ShearX, ShearY -.3 to .3; TranslateXRel, TranslateYRel -.45 to
    .45; Posterize 4 to 0; Solarize 256 to 0; SolarizeAdd 0 to 110; enhancements .1 to 1.9, where 1 changes nothing.
    Without `increasing`, Posterize and Solarize run the other way, and enhancements grow from .1 to 1.9.
    """
    part, sign = level / 10, -1 if negative else 1
    match name:
        case "Rotate":
            return sign * (part * 30)
        case "ShearX" | "ShearY":
            return sign * (part * 0.3)
        case "TranslateXRel" | "TranslateYRel":
            return sign * (part * 0.45)
        case "Posterize":
            return 4 - int(part * 4) if increasing else int(part * 4)
        case "Solarize":
            threshold = min(256, int(part * 256))
            return 256 - threshold if increasing else threshold
        case "SolarizeAdd":
            return min(128, int(part * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return max(0.1, 1 + sign * (part * 0.9)) if increasing else part * 1.8 + 0.1
        case _:
            return 0.0


def perform(image: Image.Image, operation: Operation, fill: Colour) -> Image.Image:
    """The RGB image after the operation; pixels from outside the image have the colour `fill`.

    Posterize to 0 bits gives black, as earlier versions of Pillow did; Pillow 13 raises an error.
    """
    amount = operation.argument
    match operation.name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Posterize":
            bits = 256 - 2 ** (8 - min(max(int(amount), 0), 8))
            return image.point([value & bits for value in range(256)] * 3)
        case "Solarize":
            return ImageOps.solarize(image, int(amount))
        case "SolarizeAdd":
            return image.point([min(255, value + int(amount)) if value < 128 else value for value in range(256)] * 3)
        case "Sharpness":
            return Image.blend(smooth(image), image, amount)
        case name if name in _ENHANCERS:
            return _ENHANCERS[name](image).enhance(amount)
        case _:
            return _moved(image, operation, fill)


def _moved(image: Image.Image, operation: Operation, fill: Colour) -> Image.Image:
    amount, resample = operation.argument, operation.resample
    match operation.name:
        case "Rotate":
            return image.rotate(amount, resample=resample, fillcolor=fill)
        case "ShearX":
            return slide(image, "x", amount, 0.0, resample, fill)
        case "ShearY":
            return slide(image, "y", amount, 0.0, resample, fill)
        case "TranslateXRel":
            return slide(image, "x", 0.0, amount * image.width, resample, fill)
        case "TranslateYRel":
            return slide(image, "y", 0.0, amount * image.height, resample, fill)
        case name:
            raise ValueError(f"operation {name}, expected one of {', '.join(OPERATIONS)}")


def _refused(text: str, part: str) -> BeitJaxError:
    wanted = "rand and parts of n2 m9 mstd0.5 mmax10 inc1 p0.5, joined by -"
    return BeitJaxError(f"--augment.randaugment: expected {wanted}, found {printable(part)} in {printable(text)}")
