"""The confusion matrix of a classifier as a picture, with its most frequent mistakes in words."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from beit_jax.atomic import new_file
from beit_jax.errors import printable

from .accuracy import Scores, confused, nonzero

NAMED_CLASSES = 40  # with at most so many, rows and columns have names and cells have numbers
LISTED = 30


def confusion_picture(scores: Scores, destination: Path) -> None:
    """Draws the confusion matrix as PNG, with the shares of each row; beside it the most frequent mistakes in words.

    Up to 40 classes, every cell has a name and a number. With more classes a class takes a few pixels or one, and with
    more than a thousand, classes share a pixel. Colours follow the fourth root of the share, so that single mistakes
    stay visible.

    Raises:
        BeitJaxError: the destination cannot be written.
    """
    from matplotlib.figure import Figure  # not at the top: only pictures need it

    shares = _row_shares(scores)
    few = len(scores.labels) <= NAMED_CLASSES
    side = 3 + 0.42 * len(scores.labels) if few else 12.0
    figure = Figure(figsize=(side + 6, max(side, 6.0)), dpi=100, layout="compressed")
    grid, words = figure.subplots(1, 2, width_ratios=(side, 5))
    last = len(scores.labels) - 0.5
    shown = grid.imshow(
        shares**0.25, cmap="magma", vmin=0, vmax=1, extent=(-0.5, last, last, -0.5), interpolation="none"
    )
    grid.set(xlabel="predicted", ylabel="class", title=f"top-1 {100 * scores.top1:.2f} % of {scores.count:,} images")
    bar = figure.colorbar(shown, ax=grid, shrink=0.6, label="share of the class's images")
    bar.set_ticks([0, 0.001**0.25, 0.01**0.25, 0.1**0.25, 1], labels=["0", "0.1 %", "1 %", "10 %", "100 %"])
    if few:
        _name_cells(grid, scores, shares)
    words.axis("off")
    words.text(0, 1, "\n".join(_mistakes(scores)), va="top", family="monospace", fontsize=9, parse_math=False)
    with new_file(destination) as path:
        figure.savefig(path, format="png")


def _row_shares(scores: Scores) -> Float[np.ndarray, "rows rows"]:
    """The confusion matrix divided by its row sums. With more than a thousand classes, neighbours are added up."""
    step = -(-len(scores.labels) // 1000)
    truth, predicted, images = nonzero(scores.confusion).T
    counts = np.zeros((-(-len(scores.labels) // step),) * 2)
    np.add.at(counts, (truth // step, predicted // step), images)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _name_cells(grid: Any, scores: Scores, shares: np.ndarray) -> None:
    names = [printable(label, 20) for label in scores.labels]
    grid.set_xticks(range(len(names)), labels=names, rotation=90, parse_math=False)
    grid.set_yticks(range(len(names)), labels=names, parse_math=False)
    for truth, taken, images in nonzero(scores.confusion).tolist():
        colour = "black" if shares[truth, taken] > 0.4 else "white"
        grid.text(taken, truth, str(images), ha="center", va="center", fontsize=8, color=colour)


def _mistakes(scores: Scores) -> list[str]:
    found = confused(scores)
    lines = [
        f"{images:6,}  {printable(scores.labels[truth], 24)} as {printable(scores.labels[taken], 24)}"
        for truth, taken, images in found[:LISTED]
    ]
    rest = f"and {len(found) - LISTED:,} more pairs" if len(found) > LISTED else ""
    return [f"images  taken for another class ({sum(images for *_, images in found):,} in all)", "", *lines, rest]
