"""The command `plot`: pictures of the inside of a model, of training and of parity. Imports wait until it runs."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg, subcommand

from beit_jax.cli.arguments import Hub, Json, SourceName
from beit_jax.errors import BeitJaxError, printable
from beit_jax.terminal import print_json, print_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from beit_jax.looking.interpret import Attending, ImageAttention

_Image = Annotated[Path, arg(metavar="IMAGE", help="Image file.")]
_Output = Annotated[Path, arg(aliases=["-o"], help="Picture to write, ending in .png, .svg or .pdf.")]
_Block = Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")]
_Patch = Annotated[
    tuple[int, int] | None,
    arg(
        metavar="ROW COLUMN",
        help="The patch that attends; 1 1 is at the top left. By default what the model pools: the mean of all "
        "patches, or the class token.",
        help_behavior_hint="",
    ),
]
_Hub = Annotated[Hub, arg(name="")]


@dataclass(frozen=True, kw_only=True)
class _ImagePlot:
    """The arguments of the two plots of an image."""

    checkpoint: Positional[SourceName]
    image: Positional[_Image]
    patch: _Patch = None
    class_token: bool = False
    """The class token attends, also where the model pools the patches."""
    json: Json = False
    hub: _Hub = Hub()

    @property
    def attending(self) -> "Attending":
        """What attends.

        Raises:
            BeitJaxError: a patch and the class token were given.
        """
        if self.class_token and self.patch is not None:
            raise BeitJaxError("--patch and --class-token were both given; give one")
        return "class" if self.class_token else self.patch

    def attention(self) -> "ImageAttention":
        """Computes the attention in the image, in all blocks."""
        from beit_jax.images.bands import check_bands
        from beit_jax.images.files import read_image_file
        from beit_jax.inference import predict
        from beit_jax.looking.interpret import image_attention

        check_bands(read_image_file(self.image), printable(self.image))  # before a checkpoint is fetched for nothing
        model, processor = predict.from_pretrained(
            self.checkpoint, revision=self.hub.revision, cache_dir=self.hub.cache_dir
        )
        return image_attention(model, processor, self.image)


@dataclass(frozen=True, kw_only=True)
class AttentionPlot(_ImagePlot):
    """The attention of what a model pools, or of a token, to the patches of an image: a map for every head of a block.

    Try:
      beit-jax plot attention microsoft/beit-base-patch16-224 cat.jpg
      beit-jax plot attention ./native cat.jpg --block 3 --patch 7 8 -o patch.pdf
    """

    output: _Output = Path("attention.png")
    block: _Block = None
    """The block, from 1; by default the last."""

    def draw(self) -> int:
        from beit_jax.looking import visualize
        from beit_jax.looking.interpret import checked_block

        _check_output(self.output, "attention.png", self.image)
        attending = self.attending
        attention = self.attention()
        figure = visualize.attention_maps(attention, block=self.block, patch=attending)
        facts = {
            "block": checked_block(self.block, attention.depth),
            "of": attention.named(attending),
            "patch": self.patch,
            "grid": attention.grid,
            "to_class_token": attention.class_shares(self.block, attending).tolist(),
        }
        return _write(figure, self.output, {"image": str(self.image)} | facts, json=self.json)


@dataclass(frozen=True, kw_only=True)
class RolloutPlot(_ImagePlot):
    """The share of every patch in what the model pools, or in a token, by attention rollout (arXiv 2005.00928).

    Try:
      beit-jax plot rollout microsoft/beit-base-patch16-224 cat.jpg
      beit-jax plot rollout ./native cat.jpg --patch 7 8 --json
    """

    output: _Output = Path("rollout.png")

    def draw(self) -> int:
        from beit_jax.looking import visualize

        _check_output(self.output, "rollout.png", self.image)
        attending = self.attending
        attention = self.attention()
        figure = visualize.attention_rollout(attention, patch=attending)
        shares = {
            "of": attention.named(attending),
            "patch": self.patch,
            "shares": attention.rollout_map(attending).tolist(),
        }
        return _write(figure, self.output, {"image": str(self.image)} | shares, json=self.json)


@dataclass(frozen=True, kw_only=True)
class PositionBiasPlot:
    """The relative position bias of every head, by the offset between two patches.

    Try:
      beit-jax plot position-bias microsoft/beit-large-patch16-224-pt22k
      beit-jax plot position-bias ./native --block 1 -o first-block.svg
    """

    checkpoint: Positional[SourceName]
    output: _Output = Path("position-bias.png")
    block: _Block = None
    """The block, from 1; by default the table that all blocks share, or the last block's if there is none."""
    json: Json = False
    hub: _Hub = Hub()

    def draw(self) -> int:
        from beit_jax.inference import predict
        from beit_jax.looking import visualize
        from beit_jax.looking.interpret import position_bias

        _check_output(self.output, "position-bias.png")
        model, _ = predict.from_pretrained(self.checkpoint, revision=self.hub.revision, cache_dir=self.hub.cache_dir)
        bias = position_bias(model, self.block)
        facts = {"table": bias.table, "offsets": list(bias.offsets.shape[1:]), **bias.class_entries()}
        return _write(visualize.position_bias(bias), self.output, facts, json=self.json)


@dataclass(frozen=True, kw_only=True)
class CurvesPlot:
    """Loss, learning rate, scores and speed of one or several runs of `beit-jax train`, by step.

    Try:
      beit-jax plot curves ./run
      beit-jax plot curves ./first ./second -o loss.png --metrics loss grad_norm --log grad_norm
    """

    runs: Positional[
        Annotated[
            tuple[Path, ...], arg(metavar="RUN...", help="Directories of runs.", help_behavior_hint="(at least one)")
        ]
    ]
    output: _Output = Path("curves.png")
    metrics: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Metrics to draw; by default the usual ones, and all of validation."""
    log: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Metrics to draw on a logarithmic axis."""
    json: Json = False

    def draw(self) -> int:
        from beit_jax.looking import visualize
        from beit_jax.train.loop.metrics_file import METRICS, read_metrics

        _check_output(self.output, "curves.png", *(run / METRICS for run in self.runs))
        labels = _labels(self.runs)
        runs = {label: read_metrics(run / METRICS) for label, run in zip(labels, self.runs, strict=True)}
        figure = visualize.training_curves(runs, metrics=self.metrics, log=self.log)
        facts = [
            {"run": str(run), "label": label, "records": len(records), "last_step": int(records[-1]["step"])}
            for run, (label, records) in zip(self.runs, runs.items(), strict=True)
        ]
        return _write(figure, self.output, {"runs": facts}, json=self.json)


@dataclass(frozen=True, kw_only=True)
class ParityPlot:
    """The error of every stage of a converted model against PyTorch, and its tolerance.

    Try:
      beit-jax parity ./directory --json > parity.json
      beit-jax plot parity parity.json
    """

    report: Positional[Annotated[Path, arg(metavar="REPORT", help="What beit-jax parity --json printed.")]]
    output: _Output = Path("parity.png")
    json: Json = False

    def draw(self) -> int:
        from beit_jax.convert.parity import read_report
        from beit_jax.looking import visualize

        _check_output(self.output, "parity.png", self.report)
        stages = read_report(self.report)
        different = [stage["name"] for stage in stages if not stage["passed"]]
        facts = {"stages": len(stages), "different": different}
        return _write(visualize.parity_errors(stages), self.output, facts, json=self.json)


def plot(
    kind: Annotated[
        Annotated[AttentionPlot, subcommand("attention")]
        | Annotated[RolloutPlot, subcommand("rollout")]
        | Annotated[PositionBiasPlot, subcommand("position-bias")]
        | Annotated[CurvesPlot, subcommand("curves")]
        | Annotated[ParityPlot, subcommand("parity")],
        arg(name=""),
    ],
) -> int:
    """Draw what a model attends to, its position bias, how training went, or how far parity is. Needs matplotlib.

    Label maps over images are drawn by `beit-jax segment`, predictions of hidden patches by `beit-jax reconstruct`,
    mistakes of a classifier by `beit-jax evaluate --confusion`.

    Try:
      beit-jax plot attention ./native cat.jpg
      beit-jax plot curves ./run
      beit-jax plot position-bias --help
    """
    return kind.draw()


def _labels(runs: Sequence[Path]) -> list[str]:
    """Labels of runs: the names of their directories, or the whole paths if two have the same name."""
    names = [Path(os.path.abspath(run)).name for run in runs]
    labels = [str(run) if Counter(names)[name] > 1 else name for run, name in zip(runs, names, strict=True)]
    if len(set(labels)) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise BeitJaxError(f"{printable(twice)}: given twice; name every run once")
    return labels


def _check_output(output: Path, default: str, *inputs: Path) -> None:
    """Refuses a picture that cannot be written, or that would replace what it must not, before anything is computed."""
    from beit_jax.looking import visualize, written

    visualize.check_output(output)
    written.check_picture(output, default, inputs)


def _write(figure: "Figure", output: Path, facts: Mapping[str, Any], *, json: bool) -> int:
    from beit_jax.looking.visualize import save

    save(figure, output)
    if json:
        print_json({"output": str(output)} | dict(facts))
    else:
        drawn = [f"attention of {facts['of']}"] if "of" in facts else []
        print_lines([*drawn, f"written      {printable(output)}"])
    return 0
