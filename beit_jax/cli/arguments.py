"""Arguments that several commands take. Imports wait until a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from beit_jax.errors import BeitJaxError

if TYPE_CHECKING:
    from beit_jax.bulk.table import Host
    from beit_jax.hub import Source
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.inference.segmentation import Inference
    from beit_jax.models.build import Model
    from beit_jax.train.labels.meaning import TableOptions
    from beit_jax.weights.native import NativeCheckpoint

SourceName = Annotated[
    str,
    arg(
        metavar="SOURCE",
        help="A directory in Hugging Face format, a weight file in one, a native checkpoint, or a hub name.",
    ),
]
ImageFiles = Annotated[
    tuple[Path, ...],
    arg(metavar="IMAGE...", help="Image files, or folders of them.", help_behavior_hint="(at least one)"),
]
Inputs = Annotated[
    tuple[str, ...],
    arg(
        metavar="IMAGE...",
        help="Image files, folders, patterns, @LIST of paths or - for standard input, tar archives, prepared data.",
        help_behavior_hint="(at least one)",
    ),
]
Switch = Annotated[bool, arg(help_behavior_hint="")]
"""Off by default; says what it does when given, and nothing else."""
Json = FlagCreatePairsOff[Annotated[Switch, arg(help="Print JSON for programs instead of text for people.")]]


@dataclass(frozen=True)
class Hub:
    """Options for a hub name such as microsoft/beit-base-patch16-224.

    huggingface_hub's environment variables set token, endpoint and offline mode (HF_TOKEN, HF_HUB_OFFLINE=1, ...).
    """

    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="")] = None
    """Branch, tag or commit."""
    cache_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Where downloads are kept; by default huggingface_hub's cache."""

    def resolve(self, name: str) -> "Source":
        """Calls `beit_jax.hub.resolve` with these options, and shows what is downloaded."""
        from beit_jax.hub import resolve
        from beit_jax.terminal import byte_progress

        return resolve(name, revision=self.revision, cache_dir=self.cache_dir, progress=byte_progress)

    def load(self, name: str) -> "tuple[Model, ImageProcessor]":
        """The model and the image processor of a checkpoint, as `beit_jax.from_pretrained` gives them."""
        from beit_jax.inference import predict
        from beit_jax.inference.reading import read

        checkpoint = read(self.resolve(name))
        return predict.build(checkpoint), checkpoint.processor


@dataclass(frozen=True)
class SegmentationArguments:
    """How images are cut into windows, scaled and averaged. The defaults are those of the checkpoint."""

    slide: bool = False
    """Use windows of the model's native size that overlap by a third; the default if proportions are kept."""
    whole: bool = False
    """Use the whole image at once; the default if the checkpoint resizes images to the native size."""
    as_trained: bool = False
    """Prepare images as BEiT was trained for ADE20K (ImageNet's mean, proportions kept), not as the checkpoint says."""
    scales: Annotated[tuple[float, ...], arg(help_behavior_hint="")] = ()
    """Average over these sizes, by default only 1; the published multi-scale results use 0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """Average over the mirrored image too."""
    batch_size: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Windows computed at once, by default 2."""

    def load(self, checkpoint: str, hub: Hub) -> "tuple[Model, ImageProcessor, Inference]":
        """Loads a segmentation model, its image processor and the inference options.

        Raises:
            BeitJaxError: the options contradict each other, or the model does not segment.
        """
        from beit_jax.inference.reading import read

        self.check()
        return self.of(checkpoint, read(hub.resolve(checkpoint)))

    def check(self) -> None:
        """Refuses options that contradict each other.

        Raises:
            BeitJaxError: names them.
        """
        if self.slide and self.whole:
            raise BeitJaxError("--slide and --whole were both given; give one")

    def of(self, name: str, checkpoint: "NativeCheckpoint") -> "tuple[Model, ImageProcessor, Inference]":
        """The model, image processor and inference options of a checkpoint of that name.

        Raises:
            BeitJaxError: the model does not segment.
        """
        from beit_jax.images.processor import ade20k_processor
        from beit_jax.inference import predict
        from beit_jax.inference.segmentation import DEFAULT, Inference

        mode: Literal["slide", "whole"] | None = "slide" if self.slide else "whole" if self.whole else None
        batch_size = DEFAULT.batch_size if self.batch_size is None else self.batch_size
        inference = Inference(mode, scales=self.scales or DEFAULT.scales, flip=self.flip, batch_size=batch_size)
        model, processor = predict.build(checkpoint), checkpoint.processor
        if model.config.task != "semantic_segmentation":
            raise BeitJaxError(f"{name}: does not segment (its task is {model.config.task})")
        if self.as_trained:
            trained = ade20k_processor(min(model.config.image_size))
            processor = replace(trained, do_reduce_labels=processor.do_reduce_labels)
        return model, processor, inference


@dataclass(frozen=True)
class TableArguments:
    """Where a table with a row for every image says what: CSV, tab-separated values or JSON lines."""

    image_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Column of the images' files; by default file_name, image, path or the like."""
    label_columns: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Column of classes, or a column of 0 and 1 for every class; by default label, class, tags or the like."""
    value_columns: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Columns of numbers, which are learned in place of classes."""
    separator: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """Between several classes in a cell; by default ; or | where cells have one. JSON lists need none. With "none" a
    cell is one class whatever it holds."""
    split_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Column that says train, validation or test; by default split, if there is one."""
    image_folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """What the images' names are relative to; by default the table's folder."""
    classes: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """The classes in their order: a name in every line, or a JSON list. By default they are sorted."""
    allow_unlabelled: bool = False
    """Where an image may have several classes, an empty cell means that it has none."""

    def options(self) -> "TableOptions | None":
        """The options of the library; None where none was given."""
        from beit_jax.train.labels.meaning import TableOptions

        return TableOptions(**vars(self)) if given(self) else None


@dataclass(frozen=True)
class SkipBad:
    """What happens to images that cannot be read."""

    skip_bad: bool = False
    """Leave out images that cannot be read, and name them. Without it the first one ends the command."""
    max_bad: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")] = None
    """With --skip-bad: the largest share of all images that may be left out, by default 0.1."""

    def share(self) -> float:
        """The share of images that may be left out; 0: none.

        Raises:
            BeitJaxError: the limit is no share, or was given alone.
        """
        from beit_jax.images.bad_images import MAX_BAD

        if self.max_bad is None:
            return MAX_BAD if self.skip_bad else 0.0
        if not self.skip_bad:
            raise BeitJaxError("--max-bad is the limit of --skip-bad, which was not given; give both")
        if not 0.0 < self.max_bad <= 1.0:
            raise BeitJaxError(f"--max-bad {self.max_bad}: expected a share above 0 and at most 1")
        return self.max_bad


@dataclass(frozen=True)
class ScaleArguments:
    """Many images: how they are read, and who shares them. docs/scale.md says more."""

    workers: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Processes that prepare images, by default half of the cores, at most 16; none for few images."""
    members: Annotated[tuple[str, ...], arg(metavar="ENDING...", help_behavior_hint="")] = ()
    """Endings of images in archives, such as jpg or left.jpg; by default those of all formats."""
    chunk: Annotated[int | None, arg(metavar="IMAGES", help_behavior_hint="")] = None
    """Images after which the rows so far are safe from an interruption, by default about 512."""
    process: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Which of several processes this is, from 0. Each makes its share in the same folder; the last joins the table."""
    processes: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """How many processes share the images."""
    cluster: bool = False
    """Find the other processes as `beit-jax train` does: on TPU VMs, on GKE, under SLURM."""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="")] = None
    """Join the other processes by JAX, where process 0 listens for them; with --process and --processes."""

    def check(self) -> None:
        """Refuses numbers out of range, and options that contradict each other.

        Raises:
            BeitJaxError: names the option.
        """
        require_counts(chunk=self.chunk, processes=self.processes)
        require_counts(least=0, workers=self.workers, process=self.process)
        if (self.process is None) != (self.processes is None):
            missing = "process" if self.process is None else "processes"
            raise BeitJaxError(f"--{missing}: missing; give --process and --processes together")
        if self.process is not None and self.processes is not None and self.process >= self.processes:
            raise BeitJaxError(f"--process: expected 0 to {self.processes - 1}, found {self.process}")
        if self.coordinator is not None and self.process is None:
            raise BeitJaxError("--coordinator: needs --process and --processes; give all three")
        if self.cluster and self.process is not None:
            raise BeitJaxError("--cluster finds the processes itself; leave --process and --processes out")

    @contextmanager
    def host(self) -> "Iterator[Host]":
        """Which of the processes this is; joins the others where they are joined. Enter it before any use of JAX.

        Raises:
            BeitJaxError: as `check`; or the others cannot be joined.
        """
        from beit_jax.bulk.table import Host

        self.check()
        if not self.cluster and self.coordinator is None:
            yield Host(self.process or 0, self.processes or 1)
            return
        from beit_jax.train.distributed.cluster import joined
        from beit_jax.train.recipe import HostOptions

        with joined(HostOptions(self.coordinator, self.processes, self.process)) as peers:
            yield Host(peers.index, peers.count, waits=peers.count > 1)


def given(options: Any) -> list[str]:
    """The options of a group, a dataclass, that the command line sets: "--eval-batch-size".

    Every default of the group must be a value that no user gives: None, False or ().
    """
    chosen = [item.name for item in fields(options) if getattr(options, item.name) != item.default]
    return ["--" + name.replace("_", "-") for name in chosen]


def refuse_given(options: Any, reason: str) -> None:
    """Refuses options of a group that the command line sets and the command would not use.

    Raises:
        BeitJaxError: names them, and says why.
    """
    found = given(options)
    if found:
        raise BeitJaxError(f"{', '.join(found)}: {reason}; leave {'it' if len(found) == 1 else 'them'} out")


def require_counts(*, least: int = 1, most: int = 1 << 16, **counts: int | None) -> None:
    """Refuses numbers out of range, by the names of their options: ``batch_size`` for --batch-size. None was not given.

    A larger number is a slip, and would fill the memory or the machine with processes.

    Raises:
        BeitJaxError: names the first such option.
    """
    for name, count in counts.items():
        if count is not None and not least <= count <= most:
            expected = f"an integer of at least {least}" if count < least else f"at most {most:,}"
            raise BeitJaxError(f"--{name.replace('_', '-')}: expected {expected}, found {count}")
