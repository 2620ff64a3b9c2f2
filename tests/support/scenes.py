"""Drawn scenes with masks: shapes of two colours on textured ground, in the folders in which people keep such data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

NAMES = ("ground", "berry", "leaf")
COLOURS = np.array([[110, 100, 90], [190, 50, 60], [60, 140, 60]])


def scene(
    seed: int, classes: int = 3, sides: tuple[int, int] = (48, 72)
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """A picture and its class numbers: 0 the ground, 1 discs, and of three classes 2 boxes.

    Args:
        sides: the smallest and the largest one.
    """
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
    drawn = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(drawn)
    for kind in rng.permutation(np.arange(4) % (classes - 1) + 1):
        x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
        wide, high = rng.uniform(0.12, 0.28, 2) * min(width, height)
        shape = draw.ellipse if kind == 1 else draw.rectangle
        shape((x - wide, y - high, x + wide, y + high), fill=int(kind))
    labels = np.array(drawn)
    pixels = COLOURS[labels] + rng.normal(0, 12, (height, width, 1)) + rng.normal(0, 8, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def write_scenes(
    root: Path, seeds: Sequence[int], *, classes: int = 3, split: str = "", sides: tuple[int, int] = (48, 72)
) -> Path:
    """Writes scenes as ``images/SPLIT/000.jpg`` and ``masks/SPLIT/000.png``, and returns `root`."""
    for kind in ("images", "masks"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        pixels, labels = scene(seed, classes, sides)
        Image.fromarray(pixels).save(root / "images" / split / f"{seed:03}.jpg", quality=92)
        Image.fromarray(labels).save(root / "masks" / split / f"{seed:03}.png")
    return root
