"""Pictures of the inside of a model, of training and of parity, as matplotlib figures.

The numbers come from `beit_jax.looking.interpret`, `beit_jax.train.loop.metrics_file.read_metrics` and
`beit_jax.convert.parity`. Other modules draw label maps over images (`beit_jax.looking.pictures`), masked patches and
their predictions (`beit_jax.looking.reconstruct`) and confusion matrices (`beit_jax.train.evaluation.confusion`).

The figures are not pyplot's: none has to be closed, and no window opens. Text from files is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from beit_jax.atomic import new_file
from beit_jax.errors import BeitJaxError, printable
from beit_jax.looking.interpret import Attending, ImageAttention, PositionBias, checked_block
from beit_jax.looking.written import KEY, SOFTWARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # not at the top: only pictures need it
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FORMATS: Final[Mapping[str, str]] = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
USUAL: Final = ("loss", "learning_rate", "accuracy", "masked_accuracy", "mIoU", "images_per_second")
"""The metrics that `training_curves` draws by default, in this order."""

Patch = tuple[int, int]
Records = Sequence[Mapping[str, float]]

_PANEL = 2.3  # inches: the longer side of a small picture
_HEAT = "magma"
_SMALL = 9  # points: the title of a small picture
_NARROWEST = 1.7  # inches that such a title needs
_LETTERS = 12  # letters of such a title in an inch
_DOTS = 150  # dots per inch of PNG files
_DASHED = "D--"  # style of the lines of validation
_VALIDATION = "validation_"  # prefix of some metrics of validation images


# --- Attention --------------------------------------------------------------------------------------------------------


def attention_maps(attention: ImageAttention, *, block: int | None = None, patch: Attending = None) -> "Figure":
    """Draws an image, and over it, for every head of a block, the attention of what the model pools, or of a token.

    Axes: the image; one for every head, with the attention [rows, columns] as its second image; the colour bar. The
    colours of a head end at its own maximum. Its title names the maximum and the share of the class token.

    Args:
        block, patch: as in `ImageAttention.head_maps`.

    Raises:
        BeitJaxError: no such block or patch; matplotlib is not installed.
    """
    maps, number = attention.head_maps(block, patch), checked_block(block, attention.depth)
    to_class, place = attention.class_shares(block, patch), _place(patch)
    figure, axes = _image_panels(attention, place, 1 + len(maps))
    for head, (panel, found) in enumerate(zip(axes[1:], maps, strict=True)):
        _lay_over(panel, attention, found, 0.0, float(found.max()))
        _frame(panel, place)
        panel.set_title(
            f"head {head + 1}: up to {_percent(found.max())}\nclass token {_percent(to_class[head])}", fontsize=_SMALL
        )
    _relative_bar(figure, axes)
    figure.suptitle(f"Attention of {attention.named(patch)}\nin block {number} of {attention.depth}")
    return figure


def attention_rollout(attention: ImageAttention, *, patch: Attending = None) -> "Figure":
    """Draws an image, and over it the share of every patch in what the model pools, or in a token, by `rollout`.

    Axes: the image; the rollout [rows, columns] as a second image; the colour bar. A patch has its largest share in
    itself, so the colours end at the largest share of any other patch.

    Args:
        patch: as in `ImageAttention.head_maps`.

    Raises:
        BeitJaxError: no such patch; matplotlib is not installed.
    """
    found, place = attention.rollout_map(patch), _place(patch)
    figure, axes = _image_panels(attention, place, 2, longer=3.6)
    others = found if place is None else np.delete(found, attention.tokens(place)[0] - 1)
    low, high = np.min(others, initial=found.max()), np.max(others, initial=found.min())
    shown = _lay_over(axes[1], attention, found, low, high)
    _frame(axes[1], place)
    axes[1].set_title(f"all patches: {_percent(found.sum())}", fontsize=_SMALL)
    bar = figure.colorbar(shown, ax=axes, label="share of a patch", extend="neither" if place is None else "max")
    bar.formatter = _percent_ticks()
    figure.suptitle(f"Attention rollout to {attention.named(patch)}\nthrough {attention.depth} blocks")
    return figure


def _image_panels(
    attention: ImageAttention, patch: Patch | None, count: int, longer: float = _PANEL
) -> "tuple[Figure, list[Axes]]":
    """Makes panels in the image's proportions, without ticks. The first shows the image and frames the patch."""
    height, width = attention.image.shape[:2]
    inches = max(_NARROWEST, longer * min(1.0, width / height)), longer * min(1.0, height / width) + 0.5
    figure, axes = _panels(count, *inches)
    for panel in axes:
        panel.set(xticks=[], yticks=[])
    axes[0].imshow(attention.image, **_placed(attention))
    axes[0].set_title(printable(attention.name, round(_LETTERS * inches[0])), fontsize=_SMALL, parse_math=False)
    _frame(axes[0], patch)
    return figure, axes


def _lay_over(panel: "Axes", attention: ImageAttention, values: np.ndarray, low: float, high: float) -> "AxesImage":
    """Draws the values of patches in colours over the image in grey."""
    panel.imshow(attention.image.mean(axis=2), cmap="gray", vmin=0, vmax=255, **_placed(attention))
    return panel.imshow(values, cmap=_HEAT, alpha=0.7, vmin=low, vmax=high, interpolation="none", **_placed(attention))


def _placed(attention: ImageAttention) -> dict[str, Any]:
    """Options of imshow by which a patch lies at its (column, row), and pixels are square."""
    (height, width), (rows, columns) = attention.image.shape[:2], attention.grid
    return {"extent": (0.5, columns + 0.5, rows + 0.5, 0.5), "aspect": height / rows / (width / columns)}


def _frame(panel: "Axes", patch: Patch | None) -> None:
    """Draws a frame around a patch, if one is given."""
    if patch is not None:
        from matplotlib.patches import Rectangle

        row, column = patch
        panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="cyan", linewidth=1.5))


def _relative_bar(figure: "Figure", axes: "Sequence[Axes]") -> None:
    """Draws the colour bar of panels of which each has its own maximum."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shown = ScalarMappable(Normalize(0, 1), _HEAT)
    bar = figure.colorbar(shown, ax=list(axes), label="attention to a patch", alpha=0.7, aspect=40)
    bar.set_ticks([0, 0.5, 1], labels=["0", "half", "the head's\nmaximum"])


def _place(patch: Attending) -> Patch | None:
    """The patch to frame, if it is one."""
    return None if patch == "class" else patch


def _percent_ticks() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, symbol=" %")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


# --- Relative position bias -------------------------------------------------------------------------------------------


def position_bias(bias: PositionBias) -> "Figure":
    """Draws the bias of every head by the offset of the attended patch from the attending patch in the middle.

    Axes: one for every head, with the image `bias.offsets[head]` at its offsets in patches; one colour bar. The titles
    name the three biases of the class token.

    Raises:
        BeitJaxError: matplotlib is not installed.
    """
    heads, height, width = bias.offsets.shape
    longer = max(height, width)
    figure, axes = _panels(heads, max(_NARROWEST, _PANEL * width / longer), _PANEL * height / longer + 0.8)
    most = float(np.abs(bias.offsets).max())
    extent = -width / 2, width / 2, height / 2, -height / 2
    for head, panel in enumerate(axes):
        shown = panel.imshow(
            bias.offsets[head], cmap="RdBu_r", vmin=-most, vmax=most, extent=extent, interpolation="none"
        )
        panel.plot(0, 0, marker="+", color="black")
        panel.set_title(
            f"head {head + 1}\nCLS → patch {bias.cls_to_patch[head]:+.3g}\n"
            f"patch → CLS {bias.patch_to_cls[head]:+.3g}\nCLS → CLS {bias.cls_to_cls[head]:+.3g}",
            fontsize=_SMALL,
        )
        panel.tick_params(labelsize=7)
        panel.locator_params(nbins=5, integer=True)
    figure.colorbar(shown, ax=axes, label="added to the scaled attention score", aspect=40)
    figure.suptitle(
        f"Relative position bias ({bias.table})\nof a patch so many rows and columns away from the attending one (+)"
    )
    return figure


# --- Training curves --------------------------------------------------------------------------------------------------


def training_curves(runs: Mapping[str, Records], *, metrics: Sequence[str] = (), log: Sequence[str] = ()) -> "Figure":
    """Draws metrics of runs by step: a panel for each metric, a colour for each run, dashes for validation.

    Values that are not finite are gaps.

    Args:
        runs: label to records, as `beit_jax.train.loop.metrics_file.read_metrics` gives them.
        metrics: the metrics to draw; "loss" includes "validation_loss". By default those of `USUAL` that the runs have,
            and all whose names begin with "validation_".
        log: metrics to draw on a logarithmic axis.

    Raises:
        BeitJaxError: a run has no records, no run has a metric, a value for a logarithmic axis is not above 0, or
            matplotlib is not installed.
    """
    drawn, logarithmic = _drawn(runs, metrics), [_panel_of(name) for name in log]
    _check_names("log", logarithmic, drawn)
    last = max(record["step"] for records in runs.values() for record in records)
    figure, axes = _panels(len(drawn), 4.2, 2.8)
    colours = _distinct(len(runs))
    for name, panel in zip(drawn, axes, strict=True):
        for (label, records), colour in zip(runs.items(), colours, strict=True):
            for training, style in ((True, ".-"), (False, _DASHED)):
                points = _points(records, name, training)
                _check_logarithm(name, points, name in logarithmic)
                panel.plot(*points.T, style, color=colour, markersize=3, linewidth=1, label=label)
        panel.set_title(printable(name, 40), parse_math=False)
        panel.set(xlabel="step", xlim=(0, 1.02 * max(last, 1)), yscale="log" if name in logarithmic else "linear")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    _curve_legend(figure, list(runs), colours)
    return figure


def _points(records: Records, metric: str, training: bool) -> np.ndarray:
    """(step, value) [points, 2] of the records of training, or of validation.

    Validation records may use the names of training's metrics.
    """
    found = [
        (record["step"], record[name])
        for record in records
        for name in (metric, _VALIDATION + metric)
        if name in record and _is_training(record) == training
    ]
    return np.reshape(np.array(found, np.float64), (-1, 2))


def _is_training(record: Mapping[str, float]) -> bool:
    return "loss" in record or "images_per_second" in record  # a record has no loss if no step was finite


def _panel_of(metric: str) -> str:
    return metric.removeprefix(_VALIDATION)


def _drawn(runs: Mapping[str, Records], chosen: Sequence[str]) -> list[str]:
    """The metrics that get a panel, in order."""
    for label, records in runs.items():
        if not records:
            raise BeitJaxError(f"{printable(label)}: no metrics yet; wait for the first record of the run")
    if not runs:
        raise BeitJaxError("no runs given; name at least one directory")
    names = {name for records in runs.values() for record in records for name in record} - {"step"}
    panels = sorted({_panel_of(name) for name in names})
    if chosen:
        unique = list(dict.fromkeys(_panel_of(name) for name in chosen))
        _check_names("metrics", unique, panels)
        return unique
    usual = [name for name in USUAL if name in panels]
    scores = sorted({_panel_of(name) for name in names if name.startswith(_VALIDATION)} - set(USUAL))
    if not usual + scores:
        raise BeitJaxError(f"none of the usual metrics is there; choose some of {_listed(panels)}")
    return usual + scores


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise BeitJaxError(f"{option}: expected some of {_listed(known)}, found {printable(name)}")


def _check_logarithm(metric: str, points: np.ndarray, logarithmic: bool) -> None:
    below = points[points[:, 1] <= 0]
    if logarithmic and len(below):
        step, value = below[0]
        raise BeitJaxError(f"log: {printable(metric)} is {value:g} at step {step:.0f}, which has no logarithm")


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names), 400)


def _distinct(count: int) -> list[Any]:
    """Colours that can be told apart."""
    from matplotlib import colormaps

    return [colormaps["tab10"](i) if count <= 10 else colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _curve_legend(figure: "Figure", labels: Sequence[str], colours: Sequence[Any]) -> None:
    """Draws the legend below the panels: the colours of the runs, and the dashes of validation."""
    from matplotlib.lines import Line2D

    lines = [line for panel in figure.axes for line in panel.lines]
    dashed = any(line.get_linestyle() == "--" and np.size(line.get_xdata()) for line in lines)
    names = [printable(label, 60) for label in labels] + ["validation"] * dashed
    handles = [Line2D([], [], color=colour) for colour in colours]
    handles += [Line2D([], [], color="grey", linestyle="--", marker="D", markersize=3)] * dashed
    columns = max(1, min(len(names), 100 // max(map(len, names))))
    legend = figure.legend(handles, [" "] * len(names), loc="outside lower center", ncols=columns)
    for text, name in zip(
        legend.get_texts(), names, strict=True
    ):  # without mathematics, and with names that begin with "_"
        text.set(text=name, parse_math=False)


# --- Parity -----------------------------------------------------------------------------------------------------------


def parity_errors(stages: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws the errors of every stage of a model and their tolerance, on a logarithmic axis.

    Lines: the largest error of every stage, the mean error, the tolerance. Stages that differ are red. An error of 0
    has no place on a logarithmic axis; it is written as text, and so is an error that is not finite.

    Args:
        stages: as `beit_jax.convert.parity.Stage.as_dict` gives them and `beit-jax parity --json` prints them.

    Raises:
        BeitJaxError: there are no stages, or matplotlib is not installed.
    """
    if not stages:
        raise BeitJaxError("no stages to draw; run beit-jax parity again")
    figure, (panel,) = _panels(1, max(5.0, 1.5 + 0.3 * len(stages)), 4.2)
    places = range(len(stages))
    errors = {key: [stage[key] for stage in stages] for key in ("max_error", "mean_error", "tolerance")}
    panel.plot(places, errors["max_error"], "o-", color="C0", markersize=5, label="largest error")
    panel.plot(places, errors["mean_error"], "o-", color="C0", alpha=0.4, markersize=3, label="mean error")
    panel.plot(places, errors["tolerance"], drawstyle="steps-mid", color="black", linestyle="--", label="tolerance")
    different = [place for place in places if not stages[place]["passed"]]
    if different:
        found = [errors["max_error"][place] for place in different]
        panel.plot(different, found, "X", color="C3", markersize=9, linestyle="none", label="different")
    for place, error in enumerate(errors["max_error"]):
        if error == 0 or not math.isfinite(error):
            words = "equal to the bit" if error == 0 else "not finite"
            panel.text(place, 0.02, words, transform=panel.get_xaxis_transform(), rotation=90, ha="center", fontsize=8)
    names = [printable(stage["name"], 30) for stage in stages]
    panel.set_xticks(places, labels=names, rotation=90, parse_math=False)
    panel.set_yscale("log", nonpositive="mask")
    panel.set_ylabel("absolute error")
    panel.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    verdict = f"first difference at {names[different[0]]}" if different else "all stages agree with PyTorch"
    panel.set_title(f"Parity: {verdict}", parse_math=False)
    return figure


# --- Files ------------------------------------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Refuses the name of a picture without a known format, before anything is computed.

    Raises:
        BeitJaxError: the name does not end in .png, .svg or .pdf.
    """
    if path.suffix.lower() not in FORMATS:
        raise BeitJaxError(f"{printable(path)}: expected a name ending in .png, .svg or .pdf")


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure in the format of the file's ending. An existing file is replaced.

    Raises:
        BeitJaxError: the name does not end in .png, .svg or .pdf, or the file cannot be written.
    """
    check_output(path)
    with new_file(path) as partial:
        form = FORMATS[path.suffix.lower()]
        author = {KEY: SOFTWARE} if form == "png" else {"Creator": SOFTWARE}
        figure.savefig(partial, format=form, dpi=_DOTS, bbox_inches="tight", metadata=author)


def _panels(count: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """Makes a figure of `count` panels, row by row; `width` and `height` of a panel are in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BeitJaxError("matplotlib is not installed; pip install 'beit-jax[plot]'") from None
    columns = math.ceil(math.sqrt(1.5 * count)) if count > 1 else 1
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width + 1.2, rows * height + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for empty in axes[count:]:
        empty.remove()
    return figure, list(axes[:count])
