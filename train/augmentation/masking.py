"""BEiT's blockwise masks: rectangles of patches are drawn until enough patches are hidden.

Source of the semantics: microsoft/unilm@768a3c8 beit/masking_generator.py, and beit2's for the exact number.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool

from beit_jax.errors import BeitJaxError

from ..recipe import MaskOptions

ATTEMPTS: Final = 10  # to place a block; after that the mask stays as it is


@dataclass(frozen=True)
class BlockMask:
    """Draws masks over a grid of (rows, columns) patches: bool [patches], row-major, True where a patch is hidden.

    A mask hides `options.patches` patches at most. If the last block finds no place, it hides fewer: in a third of the
    masks, usually by one or two. With `options.exact`, single random patches make up the number.

    Raises:
        BeitJaxError: the options describe no mask of this grid.
    """

    grid: tuple[int, int]
    options: MaskOptions

    def __post_init__(self) -> None:
        rows, columns = self.grid
        options = self.options
        largest = (rows - 1) * (columns - 1)  # blocks are smaller than the grid along both sides
        if largest < 1:
            raise BeitJaxError(f"--model.image-size: blocks hide parts of 2x2 patches and more, found {rows}x{columns}")
        _require(1 <= options.patches <= rows * columns, "patches", f"1 to {rows * columns}", options.patches)
        _require(1 <= options.min_block <= largest, "min-block", f"1 to {largest}", options.min_block)
        if options.max_block is not None:
            _require(options.max_block >= 1, "max-block", "a positive integer or None", options.max_block)
        _require(0 < options.min_aspect <= 1, "min-aspect", "a number in (0, 1]", options.min_aspect)

    def __call__(self, rng: np.random.Generator) -> Bool[np.ndarray, " patches"]:
        mask = np.zeros(self.grid, np.bool_)
        missing = self.options.patches
        while missing and (added := self._add_block(mask, missing, rng)):
            missing -= added
        flat = mask.reshape(-1)
        if missing and self.options.exact:
            flat[rng.choice(np.flatnonzero(~flat), missing, replace=False)] = True
        return flat

    def _add_block(self, mask: Bool[np.ndarray, "rows columns"], missing: int, rng: np.random.Generator) -> int:
        """Hides one block, in place, and returns the number of newly hidden patches, at most `missing`; 0: no place.

        The area of the block is uniform between `min_block` and the number of patches that it may newly hide. Its
        height over width is log-uniform.
        """
        options = self.options
        (rows, columns), steepest = self.grid, -math.log(options.min_aspect)
        most = missing if options.max_block is None else min(missing, options.max_block)
        for share, slope, down, across in rng.random((ATTEMPTS, 4)).tolist():
            area = options.min_block + share * (most - options.min_block)
            aspect = math.exp(steepest * (2 * slope - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(down * (rows - height + 1)), int(across * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= most:
                block[:] = True
                return added
        return 0


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise BeitJaxError(f"--mask.{name}: expected {expected}, found {found}")
