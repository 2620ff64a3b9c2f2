"""The commands `evaluate` (a classifier or a segmentation model on labelled images) and `bench` (its speed).

Imports wait until a command runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import (
    Hub,
    Json,
    SegmentationArguments,
    SkipBad,
    SourceName,
    Switch,
    TableArguments,
    refuse_given,
    require_counts,
)
from beit_jax.errors import BeitJaxError, needs_extra, printable
from beit_jax.terminal import image_progress, print_json, print_lines, print_table, turn_progress

if TYPE_CHECKING:
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.models.build import Model
    from beit_jax.train.evaluation.segmentation import SegmentationScores
    from beit_jax.weights.native import NativeCheckpoint

Preset: TypeAlias = Literal["hf", "unilm_eval", "timm"]
Scoring: TypeAlias = "Callable[..., SegmentationScores]"


@dataclass(frozen=True)
class ClassificationArguments:
    """How a classifier is evaluated."""

    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The split of prepared data, or below --data the folder of this name if there is one; by default validation."""
    preset: Annotated[Preset | None, arg(help_behavior_hint="")] = None
    """Prepare images as transformers, the original evaluation or timm do, not as the checkpoint says."""
    real: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """ImageNet's reassessed labels: real.json."""
    confusion: Annotated[Path | None, arg(metavar="PNG", help_behavior_hint="")] = None
    """PNG to write: the confusion matrix."""
    per_class: bool = False
    """Print a line for every class."""
    eval_batch_size: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Images computed at once, by default 64."""
    workers: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Processes that prepare images; 0 uses threads instead. By default half of the cores, at most 16."""

    def check(self) -> None:
        """Refuses values that cannot be used, before a checkpoint is fetched for nothing.

        Raises:
            BeitJaxError: names the option.
        """
        require_counts(eval_batch_size=self.eval_batch_size, most=4096)
        require_counts(workers=self.workers, least=0, most=1024)
        if self.confusion is not None and self.confusion.suffix.lower() != ".png":
            raise BeitJaxError(f"{printable(self.confusion)}: expected a name ending in .png")


@dataclass(frozen=True)
class AnnotationArguments:
    """How annotations count classes, by default as the checkpoint says (do_reduce_labels).

    No class: 255 beyond the classes, and the checkpoint's semantic_loss_ignore_index.
    """

    labels_from_zero: bool = False
    """Annotations count classes from 0."""
    labels_from_one: bool = False
    """Annotations count classes from 1, and 0 is no class, as ADE20K's do."""

    def reduce(self) -> bool | None:
        """True if annotations count from 1; None: not said.

        Raises:
            BeitJaxError: both were given.
        """
        if self.labels_from_zero and self.labels_from_one:
            raise BeitJaxError("--labels-from-zero and --labels-from-one were both given; give one")
        return self.labels_from_one if self.labels_from_zero or self.labels_from_one else None


@dataclass(frozen=True)
class NeighbourArguments:
    """Classification by nearest neighbours instead of the model's classifier, of which it needs none."""

    knn: bool = False
    """Score the model's features by a vote of the nearest training images, as DINO does; nothing is trained."""
    neighbours: Annotated[tuple[int, ...], arg(metavar="NUMBER...", help_behavior_hint="")] = ()
    """With --knn: how many neighbours vote, by default 20; DINO's are 10 20 100 200."""
    temperature: Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """With --knn: votes weigh exp(similarity / temperature), by default 0.07."""
    pooling: Annotated[Literal["pooled", "mean", "cls"] | None, arg(help_behavior_hint="")] = None
    """With --knn: the features, by default the model's own pooled output."""
    train_split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """With --knn: the split of the images that vote, by default train. Where it is --split itself, or there is none,
    every image is classified by all others."""

    def check(self) -> None:
        """Refuses values that cannot be used, before a checkpoint is fetched for nothing.

        Raises:
            BeitJaxError: names the option.
        """
        if not self.knn:
            refuse_given(self, "for --knn, which was not given")
        for number in self.neighbours:
            require_counts(neighbours=number)
        if self.temperature is not None and not 0.0 < self.temperature < float("inf"):
            raise BeitJaxError(f"--temperature {self.temperature}: expected a number above 0")


@dataclass(frozen=True)
class WorstArguments:
    """A picture of the images on which segmentation scores worst."""

    worst: Annotated[tuple[int, Path] | None, arg(metavar="NUMBER PNG|DIR", help_behavior_hint="")] = None
    """Draw so many images of the smallest mIoU, each beside its truth and what was found: on one sheet, or in a new
    folder."""

    def check(self) -> None:
        """Refuses values that cannot be used, before a checkpoint is fetched for nothing.

        Raises:
            BeitJaxError: names the option.
        """
        from beit_jax.atomic import check_file, check_place

        if self.worst is not None:
            require_counts(worst=self.worst[0], most=256)
            if self.worst[1].suffix.lower() == ".png":
                check_file(self.worst[1])
            elif self.worst[1].suffix or self.worst[1].exists():
                found = "exists" if self.worst[1].exists() else "has another ending"
                raise BeitJaxError(
                    f"--worst: {printable(self.worst[1])} {found}, expected a name in .png or a new folder"
                )
            else:
                check_place(self.worst[1])


def evaluate(
    checkpoint: Positional[SourceName],
    *,
    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    images: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    annotations: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    numbering: Annotated[AnnotationArguments, arg(name="")] = AnnotationArguments(),
    json: Json = False,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    table: Annotated[TableArguments, arg(name="")] = TableArguments(),
    classification: Annotated[ClassificationArguments, arg(name="")] = ClassificationArguments(),
    neighbours: Annotated[NeighbourArguments, arg(name="")] = NeighbourArguments(),
    segmentation: Annotated[SegmentationArguments, arg(name="")] = SegmentationArguments(),
    worst: Annotated[WorstArguments, arg(name="")] = WorstArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Score a checkpoint on labelled images: top-1 and top-5 of a classifier, or mIoU, mAcc and aAcc of segmentation.

    Of a classifier of which several classes may hold: mAP, F1 and exact matches; of one that gives numbers: MAE, RMSE
    and R2. Which it is, its problem_type says, or else the data.

    Try:
      beit-jax evaluate facebook/data2vec-vision-base-ft1k --data ./imagenet
      beit-jax evaluate ./native --data ./folder-per-class --preset unilm_eval --confusion mistakes.png
      beit-jax evaluate ./encoder --data ./folder-per-class --knn --neighbours 10 20 100
      beit-jax evaluate ./native --data ./prepared-masks --worst 8 worst.png
      beit-jax evaluate ./native --images ADE/images/validation --annotations ADE/annotations/validation --as-trained
      beit-jax evaluate ./native --images DIR --annotations DIR --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --as-trained

    Args:
        data: For a classifier: data from `beit-jax prepare`, a table with a row for every image (or a folder with its
            metadata.csv or .jsonl), or a folder of images per class. For segmentation: data from `beit-jax prepare`.
        images: For segmentation: the folder of images.
        annotations: The folder of label maps, PNG or other files with a class number for every pixel, named as their
            images.
    """
    worst.check()
    neighbours.check()
    if data is not None and images is None and annotations is None:
        with needs_extra("train"):
            from beit_jax.train.data.datasets import holds_label_maps
        if holds_label_maps(data):
            for of_classifiers in (replace(classification, split=None), table, neighbours):
                refuse_given(of_classifiers, f"for a classifier, and {printable(data)} holds label maps")
            refuse_given(numbering, "prepared data say how they count classes")
            opened = _prepared_maps(data, classification.split or "validation")
            return _evaluate_segmentation(checkpoint, opened, segmentation, worst, hub, skip.share(), json=json)
        for unused in (segmentation, numbering, worst):
            refuse_given(unused, "for segmentation, and --data evaluates a classifier")
        classification.check()
        if neighbours.knn:
            return _evaluate_neighbours(
                checkpoint, data, table, classification, neighbours, skip.share(), hub, json=json
            )
        return _evaluate_classifier(checkpoint, data, table, classification, skip.share(), hub, json=json)
    if data is not None or images is None or annotations is None:
        raise BeitJaxError("give --data to evaluate a classifier, or --images and --annotations for segmentation")
    for of_classifiers in (classification, table, neighbours):
        refuse_given(of_classifiers, "for a classifier, and --images evaluates segmentation")
    folders = _folders_of_maps(images, annotations, numbering.reduce(), allow_missing=skip.share() > 0)
    return _evaluate_segmentation(checkpoint, folders, segmentation, worst, hub, skip.share(), json=json)


def _evaluate_classifier(
    checkpoint: str,
    data: Path,
    table: TableArguments,
    options: ClassificationArguments,
    max_bad: float,
    hub: Hub,
    *,
    json: bool,
) -> int:
    """`beit-jax evaluate` with ``--data``."""
    from beit_jax.atomic import check_file

    with needs_extra("train"):
        from beit_jax.train.evaluation import labelled
        from beit_jax.train.evaluation.accuracy import Scores
        from beit_jax.train.evaluation.confusion import confusion_picture
        from beit_jax.train.evaluation.opening import open_labelled

    # Before a checkpoint is fetched for nothing.
    opened = open_labelled(data, options.split or "validation", table.options(), allow_missing=max_bad > 0)
    if options.confusion is not None:
        read = getattr(opened, "paths", ())
        check_file(options.confusion, inputs=[*read, *filter(None, [options.real])])
    model, processor = hub.load(checkpoint)
    processor = _prepared_as(options.preset, model, processor)
    problem = labelled.problem_type_of(model, opened)
    if options.confusion is not None and problem != "single_label_classification":
        raise BeitJaxError(f"--confusion: of classes of which one holds, the model is for {problem}; leave it out")
    scores = labelled.evaluate_images(
        model,
        processor,
        opened,
        real=options.real,
        batch_size=options.eval_batch_size or 64,
        workers=options.workers,
        max_bad=max_bad,
        progress=partial(image_progress, description="evaluating"),
    )
    if options.confusion is not None:
        assert isinstance(scores, Scores)
        confusion_picture(scores, options.confusion)
    if json:
        print_json(scores.as_dict())
        return 0
    if options.per_class:
        print_table(*labelled.table(scores))
    print_lines(labelled.lines(scores))
    return 0


def _prepared_as(name: Preset | None, model: "Model", processor: "ImageProcessor") -> "ImageProcessor":
    """The image processor of a preset for a model, or the checkpoint's own."""
    from beit_jax.images.processor import HALF, preset

    if name is None:
        return processor
    mean, std = processor.mean or HALF, processor.std or HALF
    steps = preset(name, model.config.image_size, mean=mean, std=std, num_channels=processor.num_channels)
    factor = processor.rescale_factor if processor.num_channels != 3 else steps.rescale_factor
    return replace(steps, bands=processor.bands, rescale_factor=factor)


def _evaluate_neighbours(
    checkpoint: str,
    data: Path,
    table: TableArguments,
    options: ClassificationArguments,
    how: NeighbourArguments,
    max_bad: float,
    hub: Hub,
    *,
    json: bool,
) -> int:
    """`beit-jax evaluate` with ``--knn``."""
    with needs_extra("train"):
        from beit_jax.train.evaluation.neighbour_scores import (
            PREFERRED,
            TEMPERATURE,
            evaluate_neighbours,
            open_pair,
        )
    of_classifier = ClassificationArguments(real=options.real, confusion=options.confusion, per_class=options.per_class)
    refuse_given(of_classifier, "for a classifier, and --knn scores features")
    split = options.split or "validation"
    train, tests = open_pair(data, split, how.train_split, table.options(), allow_missing=max_bad > 0)
    model, processor = hub.load(checkpoint)
    scores = evaluate_neighbours(
        model,
        _prepared_as(options.preset, model, processor),
        train,
        tests,
        ks=how.neighbours or (PREFERRED,),
        temperature=how.temperature or TEMPERATURE,
        pooling=how.pooling or "pooled",
        batch_size=options.eval_batch_size or 64,
        workers=options.workers,
        max_bad=max_bad,
        progress=partial(image_progress, description="computing features"),
    )
    if json:
        print_json(scores.as_dict())
    else:
        print_lines(scores.lines())
    return 0


def _prepared_maps(data: Path, split: str) -> "Scoring":
    """How prepared data are scored; opened before a checkpoint is fetched for nothing."""
    with needs_extra("train"):
        from beit_jax.train.data.datasets import open_segmentation
        from beit_jax.train.evaluation.segmentation import evaluate_prepared
    opened = open_segmentation(data, split)
    return lambda model, processor, how, **options: evaluate_prepared(model, processor, opened, how, **options)


def _folders_of_maps(images: Path, annotations: Path, reduce: bool | None, *, allow_missing: bool) -> "Scoring":
    """How folders are scored; listed before a checkpoint is fetched for nothing."""
    with needs_extra("train"):
        from beit_jax.train.data.listing import annotated_images, images_with_maps
        from beit_jax.train.evaluation.segmentation import evaluate_folders
    (images_with_maps if allow_missing else annotated_images)(images, annotations)
    return lambda model, processor, how, **options: evaluate_folders(
        model, processor, images, annotations, how, reduce=reduce, **options
    )


def _evaluate_segmentation(
    checkpoint: str,
    scoring: "Scoring",
    segmentation: SegmentationArguments,
    worst: WorstArguments,
    hub: Hub,
    max_bad: float,
    *,
    json: bool,
) -> int:
    """`beit-jax evaluate` of label maps."""
    from beit_jax.looking.compared import write_comparisons
    from beit_jax.train.evaluation import segmentation as scored

    collected = None if worst.worst is None else scored.Worst(worst.worst[0])
    model, processor, how = segmentation.load(checkpoint, hub)
    scores = scoring(model, processor, how, max_bad=max_bad, worst=collected, progress=image_progress)
    if worst.worst is not None and collected is not None:
        write_comparisons(collected.rows, model.config.labels, worst.worst[1])
    if json:
        print_json(scores.as_dict())
        return 0
    rows = [
        [
            printable(row["label"], 1024),
            *("" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("iou", "accuracy", "dice")),
        ]
        for row in scores.as_dict()["classes"]
    ]
    print_table(["class", "IoU %", "accuracy %", "Dice %"], rows)
    print_lines(scored.describe(scores))
    return 0


def bench(
    checkpoint: Positional[Annotated[str | None, arg(metavar="[SOURCE]", help_behavior_hint="")]] = None,
    *,
    size: Annotated[Literal["base", "large"] | None, arg(metavar="{base,large}", help_behavior_hint="")] = None,
    image_size: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None,
    batch_size: Annotated[int, arg(metavar="NUMBER")] = 1,
    threads: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None,
    rounds: Annotated[int, arg(metavar="NUMBER")] = 7,
    cpu_time: Switch = False,
    json: Json = False,
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Say how fast a forward pass is on this machine, beside the PyTorch libraries and engines that are installed.

    transformers (sdpa, torch.compile), timm (also compiled), ONNX Runtime and OpenVINO compute the same images by the
    same weights, in float32 on the CPU; what is not installed is left out and named. Each is a process of its own; they
    take turns of a second or two, in another order every round, while the others sleep. All of them hold the model at
    once.

    Try:
      beit-jax bench
      beit-jax bench ./beit-base --batch-size 8 --rounds 11 --json

    Args:
        checkpoint: A classifier: a directory in Hugging Face format, a native checkpoint, or a hub name; by default a
            model of --size with random numbers, which needs no network.
        size: Of the model with random numbers, by default base.
        image_size: Pixels of a side, by default the checkpoint's, or 224; position tables are resized.
        batch_size: Images of a call.
        threads: Cores that each may use, by default all of this process.
        rounds: Turns of each.
        cpu_time: Count the processor's seconds, not the clock's: on a machine that others use too.
    """
    from beit_jax.peers.bench import bench as measure
    from beit_jax.peers.job import cores

    require_counts(image_size=image_size, batch_size=batch_size, rounds=rounds, most=4096)
    require_counts(threads=threads, most=cores())
    if checkpoint is not None and size is not None:
        raise BeitJaxError(f"--size {size}: of a model with random numbers, and a checkpoint was given; give one")
    measured = measure(
        _benched(checkpoint, size or "base", image_size, hub),
        batch_size=batch_size,
        threads=threads,
        rounds=rounds,
        cpu_time=cpu_time,
        progress=turn_progress,
    )
    if json:
        print_json(measured.as_dict())
        return 0
    print_lines([measured.head, ""])
    print_table(*measured.rows())
    print_lines(["", *measured.lines()])
    return 0


def _benched(checkpoint: str | None, size: str, image_size: int | None, hub: Hub) -> "NativeCheckpoint":
    """The classifier that `bench` measures.

    Raises:
        BeitJaxError: the checkpoint does not classify, or has no such image size.
    """
    from beit_jax.peers.same_model import at_size, drawn

    if checkpoint is not None:
        from beit_jax.inference.reading import read

        found = read(hub.resolve(checkpoint))
        if found.config.task != "image_classification":
            raise BeitJaxError(
                f"{printable(checkpoint)}: expected a classifier, found a model of the task {found.config.task}; leave "
                "it out to measure a model with random numbers"
            )
        return at_size(found, image_size)
    import numpy as np

    from beit_jax.variants import VARIANTS

    refuse_given(hub, "for a checkpoint, which was not given")
    base, side = VARIANTS[f"beit_{size}_patch16_224"], image_size or 224
    config = replace(base, image_size=(side, side), layer_norm_eps=1e-6, drop_path_rate=0.0)  # timm's epsilon
    return drawn(config, np.random.default_rng(0))
