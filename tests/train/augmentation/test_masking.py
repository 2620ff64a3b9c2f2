"""Blockwise masks: the original's statistics, its rules one by one, and bounds that hold whatever is asked for."""

import itertools
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

from beit_jax.errors import BeitJaxError
from beit_jax.train.augmentation.masking import BlockMask
from beit_jax.train.recipe import MaskOptions

LIKELY = 1e-3  # p-value below which draws of a fixed seed would not be of the distribution they claim
GRID, DRAWS = (14, 14), 20_000

DEVIATIONS = 4
"""Standard errors that two samples of one law may lie apart: with p = 6e-5 they lie further.

The standard error of a mean over n draws is sd / sqrt(n), of a share p sqrt(p (1 - p) / n), and of a standard deviation
sd / 2 * sqrt((kurtosis - 1) / n). The reference is a sample too: variances add, and half a unit of its last digit.
"""


@dataclass(frozen=True)
class Reference:
    """Masks that the original's MaskingGenerator drew.

    mean, deviation, least, full: of the number of hidden patches in 20,000 masks; full: the share with all.
    few: so many or fewer are hidden in 10 to 15 of 20,000 masks, going by 300,000.
    counts: how often it hid `fewest`, `fewest` + 1, ... in 300,000 masks; what is below `fewest` counts as that.
    diagonal: share of those masks that hide a patch, from the corner to the centre, over the four equal ones.
    """

    options: MaskOptions
    mean: float
    deviation: float
    least: int
    full: float
    few: int
    fewest: int
    counts: tuple[int, ...]
    diagonal: tuple[float, ...]


BEIT = Reference(
    MaskOptions(),
    *(74.47, 0.99, 64, 0.666, 66),
    70,
    (1192 + 2512, 1767, 10529, 14661, 69750, 199589),
    (0.0421, 0.1573, 0.3134, 0.4672, 0.5914, 0.6745, 0.7164),
)
DATA2VEC = Reference(
    MaskOptions(patches=120, min_block=16, max_block=196),
    *(119.53, 0.95, 102, 0.694, 110),
    114,
    (703 + 441, 1375, 2160, 7248, 15606, 63377, 209090),
    (0.0873, 0.3158, 0.5713, 0.7605, 0.8693, 0.9217, 0.9416),
)


@pytest.fixture(scope="module", params=[BEIT, DATA2VEC], ids=["beit", "data2vec"])
def drawn(request: pytest.FixtureRequest) -> tuple[Reference, np.ndarray]:
    """And 20,000 masks of ours, [masks, rows, columns]."""
    generator, mask = rng(), BlockMask(GRID, request.param.options)
    return request.param, np.stack([mask(generator) for _ in range(DRAWS)]).reshape(-1, *GRID)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Statistics


def test_the_number_of_hidden_patches_has_the_originals_moments(drawn: tuple[Reference, np.ndarray]) -> None:
    reference, masks = drawn
    counts = masks.sum(axis=(1, 2))
    deviation, both = counts.std(), math.sqrt(2 / DRAWS)
    assert counts.mean() == pytest.approx(reference.mean, abs=DEVIATIONS * deviation * both + 0.005)
    error = deviation / 2 * math.sqrt(stats.kurtosis(counts, fisher=False) - 1) * both
    assert deviation == pytest.approx(reference.deviation, abs=DEVIATIONS * error + 0.005)
    full = (counts == reference.options.patches).mean()
    assert full == pytest.approx(reference.full, abs=DEVIATIONS * math.sqrt(full * (1 - full)) * both + 0.0005)


def test_the_fewest_hidden_patches_are_the_originals(drawn: tuple[Reference, np.ndarray]) -> None:
    """How many masks are as small as the original's smallest is of a Poisson law, of mean 2.6 in 300,000 of BEiT's
    masks: more than 9 have p = 5e-4. That none is among the `few`, of mean 10 or more, has p = 5e-5 at most."""
    reference, masks = drawn
    counts = masks.sum(axis=(1, 2))
    assert (counts <= reference.least).sum() <= 9
    assert counts.min() <= reference.few


def test_the_number_of_hidden_patches_has_the_originals_law(drawn: tuple[Reference, np.ndarray]) -> None:
    reference, masks = drawn
    counts = masks.sum(axis=(1, 2)).clip(min=reference.fewest)
    ours = np.bincount(counts - reference.fewest, minlength=len(reference.counts))
    assert sum(reference.counts) == 300_000 and len(ours) == len(reference.counts)
    assert stats.chi2_contingency([ours, reference.counts]).pvalue > LIKELY


def test_patches_are_hidden_as_often_as_the_originals(drawn: tuple[Reference, np.ndarray]) -> None:
    """Four equal patches are no four independent ones: the error is taken as of one."""
    reference, masks = drawn
    shares = masks.mean(axis=0)
    shares = (shares + shares[::-1] + shares[:, ::-1] + shares[::-1, ::-1]) / 4
    for ours, expected in zip(np.diag(shares), reference.diagonal, strict=False):
        error = math.sqrt(expected * (1 - expected) * (1 / DRAWS + 1 / 300_000))
        assert ours == pytest.approx(expected, abs=DEVIATIONS * error + 0.00005)


def test_places_mirror_each_other(drawn: tuple[Reference, np.ndarray]) -> None:
    """Neither axis, and neither end of one, is preferred."""
    _, masks = drawn
    shares = masks.mean(axis=0)
    error = np.sqrt(shares * (1 - shares) * 2 / DRAWS)
    for other in (shares[::-1], shares[:, ::-1], shares.T):
        assert (np.abs(shares - other) <= 5 * error).all()  # of 196 pairs, p = 1e-4


# Rules


Numbers: TypeAlias = tuple[float, float, float, float]
"""Where in its range lies the area of a block, where the logarithm of its aspect, its row and its column."""


class Script(np.random.Generator):
    """A generator whose blocks are given, the last for ever: the four numbers of [0, 1) of all attempts of each."""

    def __init__(self, *blocks: Numbers) -> None:
        super().__init__(np.random.PCG64(0))
        self.blocks = itertools.chain(blocks, itertools.repeat(blocks[-1]))

    def random(self, shape: tuple[int, int]) -> np.ndarray:  # type: ignore[override]
        return np.broadcast_to(np.array(next(self.blocks)), shape)


def scripted(options: MaskOptions, *blocks: Numbers, grid: tuple[int, int] = GRID) -> str:
    """The mask of those blocks: lines of # and ., without empty ends."""
    rows = BlockMask(grid, options)(Script(*blocks)).reshape(grid)
    lines = ["".join(".#"[int(cell)] for cell in row).rstrip(".") for row in rows]
    return "\n".join(lines).rstrip()


AT_ORIGIN = (0.0, 0.5, 0.0, 0.0)  # the smallest area, square, in the corner


@pytest.mark.parametrize(
    ("block", "options", "shape"),
    [
        (AT_ORIGIN, MaskOptions(), (4, 4)),
        ((0.0, 1.0, 0.0, 0.0), MaskOptions(), (7, 2)),  # 16 / .3 = 7.3 ** 2 and 16 * .3 = 2.2 ** 2
        ((0.0, 0.0, 0.0, 0.0), MaskOptions(), (2, 7)),
        ((0.0, 1.0, 0.0, 0.0), MaskOptions(min_aspect=1.0), (4, 4)),
        ((0.5, 0.5, 0.0, 0.0), MaskOptions(patches=56), (6, 6)),  # half way from 16 to 56
        ((0.9, 0.5, 0.0, 0.0), MaskOptions(max_block=26), (5, 5)),  # and of 16 to 26: 25
        ((0.9, 0.5, 0.0, 0.0), MaskOptions(patches=80, max_block=196, min_block=1), (8, 8)),  # of 1 to 80: 72
    ],
)
def test_areas_and_aspects(block: Numbers, options: MaskOptions, shape: tuple[int, int]) -> None:
    """The block once more adds nothing, which ends the mask."""
    rows, columns = shape
    assert scripted(options, block) == "\n".join(["#" * columns] * rows)


def test_areas_shrink_to_what_is_missing_even_below_the_smallest() -> None:
    """16 hidden, 4 missing: areas lie between 16 and 4; this one is 4."""
    found = scripted(MaskOptions(patches=20), AT_ORIGIN, (1.0, 0.5, 0.0, 0.999))
    assert found.splitlines() == ["####........##", "####........##", "####", "####"]


@pytest.mark.parametrize(("across", "added"), [(1.5 / 11, True), (2.5 / 11, False)])
def test_blocks_hide_no_more_than_is_missing(across: float, added: bool) -> None:
    """Over a 4 x 4 block of which 4 are missing, one a column on adds 4, and one two columns on would add 8."""
    found = scripted(MaskOptions(patches=20), AT_ORIGIN, (0.0, 0.5, 0.0, across))
    assert found.splitlines() == ["#####" if added else "####"] * 4


def test_blocks_hide_no_more_than_their_limit() -> None:
    options = MaskOptions(min_block=16, max_block=15, min_aspect=1.0)
    assert scripted(options, AT_ORIGIN) == ""


@pytest.mark.parametrize(("share", "sides"), [(0.0, 7), (1.0, 0)])
def test_blocks_are_smaller_than_the_grid(share: float, sides: int) -> None:
    block = (share, 0.5, 0.5, 0.5)
    assert scripted(MaskOptions(patches=64, min_block=49), block, grid=(8, 8)).count("#") == sides**2


@pytest.mark.parametrize(("down", "across", "top", "left"), [(0, 0.999, 0, 10), (0.999, 0, 10, 0), (0.5, 0.1, 5, 1)])
def test_places(down: float, across: float, top: int, left: int) -> None:
    lines = scripted(MaskOptions(), (0.0, 0.5, down, across)).splitlines()
    assert lines == [""] * top + ["." * left + "####"] * 4


@pytest.mark.parametrize(("late", "hidden"), [(0, 16), (9, 16), (10, 0)])
def test_a_block_has_ten_attempts(late: int, hidden: int) -> None:
    class Late(Script):
        def random(self, shape: tuple[int, int]) -> np.ndarray:  # type: ignore[override]
            numbers = np.array(super().random(shape))
            numbers[:late] = (0.0, 1.0, 0.0, 0.0)  # 126 patches high
            return numbers

    mask = BlockMask(GRID, MaskOptions(min_aspect=0.001))
    assert mask(Late(AT_ORIGIN)).sum() == hidden


def test_single_patches_make_up_the_exact_number_anywhere() -> None:
    """One is missing beside the corner's block: each of the others is as likely."""
    options, script = MaskOptions(patches=17, exact=True), Script(AT_ORIGIN)
    masks = np.stack([BlockMask(GRID, options)(script) for _ in range(5000)])
    assert (masks.sum(axis=1) == 17).all()
    hidden = masks.sum(axis=0).reshape(GRID)
    assert (hidden[:4, :4] == 5000).all()
    hidden[:4, :4] = 0
    assert stats.chisquare(hidden[hidden > 0]).pvalue > LIKELY and (hidden > 0).sum() == 180


def test_exact_masks_are_the_blocks_and_more() -> None:
    for seed in range(200):
        blocks, exact = (BlockMask(GRID, MaskOptions(exact=exact))(rng(seed)) for exact in (False, True))
        assert exact.sum() == 75 and not (blocks & ~exact).any()


# Bounds


@st.composite
def block_masks(draw: st.DrawFn) -> BlockMask:
    """Whatever is not refused, with blocks far larger than what may be hidden among it."""
    rows, columns = draw(st.tuples(st.integers(2, 20), st.integers(2, 20)))
    options = MaskOptions(
        patches=draw(st.integers(1, rows * columns)),
        min_block=draw(st.integers(1, (rows - 1) * (columns - 1))),
        max_block=draw(st.none() | st.integers(1, 2 * rows * columns)),
        min_aspect=draw(st.floats(1e-6, 1.0)),
        exact=draw(st.booleans()),
    )
    return BlockMask((rows, columns), options)


@given(mask=block_masks(), seed=st.integers(0, 99))
@settings(max_examples=300)
def test_never_more_are_hidden_than_asked_for(mask: BlockMask, seed: int) -> None:
    found = mask(rng(seed))
    assert found.shape == (mask.grid[0] * mask.grid[1],) and found.dtype == np.bool_
    assert found.sum() <= mask.options.patches
    assert not mask.options.exact or found.sum() == mask.options.patches
    assert_array_equal(found, mask(rng(seed)))


@pytest.mark.parametrize("patches", [20, 25, 30, 40])
def test_small_grids(patches: int) -> None:
    """Those of the digits: 8 x 8 patches."""
    generator, mask = rng(), BlockMask((8, 8), MaskOptions(patches=patches, min_block=4))
    counts = np.array([mask(generator).sum() for _ in range(1000)])
    assert counts.max() == patches and counts.mean() > patches - 1 and counts.min() > patches / 2


def test_masks_are_a_function_of_the_generator_alone() -> None:
    mask = BlockMask(GRID, MaskOptions(exact=True))
    sent = pickle.loads(pickle.dumps(mask))  # as worker processes get it
    assert_array_equal(mask(rng(3)), sent(rng(3)))
    assert len({mask(rng(seed)).tobytes() for seed in range(20)}) == 20
    generator = rng()
    assert mask(generator).tobytes() != mask(generator).tobytes()


def test_workers_do_not_import_jax() -> None:
    check = "import sys, beit_jax.train.augmentation.masking; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MaskOptions(patches=0), "--mask.patches: expected 1 to 196, found 0"),
        (MaskOptions(patches=197), "--mask.patches: expected 1 to 196, found 197"),
        (MaskOptions(min_block=0), "--mask.min-block: expected 1 to 169, found 0"),
        (MaskOptions(min_block=170), "--mask.min-block: expected 1 to 169, found 170"),
        (MaskOptions(max_block=0), "--mask.max-block: expected a positive integer or None, found 0"),
        (MaskOptions(min_aspect=0.0), "--mask.min-aspect: expected a number in (0, 1], found 0.0"),
        (MaskOptions(min_aspect=1.5), "--mask.min-aspect: expected a number in (0, 1], found 1.5"),
        (MaskOptions(min_aspect=math.nan), "--mask.min-aspect: expected a number in (0, 1], found nan"),
    ],
)
def test_options_that_describe_no_mask(options: MaskOptions, message: str) -> None:
    with pytest.raises(BeitJaxError) as caught:
        BlockMask(GRID, options)
    assert str(caught.value) == message


def test_options_fit_their_grid() -> None:
    assert BlockMask(GRID, MaskOptions(patches=196, min_block=169, exact=True))(rng()).all()
    with pytest.raises(BeitJaxError, match=r"--mask\.min-block: expected 1 to 9, found 16"):
        BlockMask((4, 4), MaskOptions(patches=4))
