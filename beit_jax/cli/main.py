"""The `beit-jax` command. A subcommand imports what it needs when it runs: ``--help`` loads neither JAX nor Pillow."""

import atexit
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from beit_jax.cli.arguments import Hub, Json, SourceName
from beit_jax.cli.plot import plot
from beit_jax.cli.training import (
    Classifying,
    aot_command,
    evaluate_classifier,
    prepare,
    tokenize_command,
    train_command,
)
from beit_jax.convert.options import Options
from beit_jax.errors import BeitJaxError, printable
from beit_jax.memory import imports, keep_freed_memory, leave_objects
from beit_jax.terminal import byte_progress, image_progress, print_json, print_lines, print_table, reader_left

if TYPE_CHECKING:
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.inference.predictor import Predictor
    from beit_jax.inference.segmentation import Inference
    from beit_jax.models.build import Model

_Images = Annotated[tuple[Path, ...], arg(metavar="IMAGE...", help="Image files.")]


@dataclass(frozen=True)
class Segmenting:
    """How images are cut, scaled and averaged. By default as the checkpoint records."""

    slide: bool = False
    """Windows of the model's native size, a third of them overlapping; the default where proportions are kept."""
    whole: bool = False
    """The whole image at once; the default where the checkpoint's images have the native size."""
    as_trained: bool = False
    """Prepare images as BEiT was trained for ADE20K (ImageNet's mean, proportions kept), not as the checkpoint says."""
    scales: tuple[float, ...] = (1.0,)
    """Average over these sizes: 0.5 0.75 1 1.25 1.5 1.75 in the published multi-scale results."""
    flip: bool = False
    """Average over the mirrored image too."""
    batch_size: int = 2
    """Windows computed at once."""

    def load(self, checkpoint: str, hub: Hub) -> "tuple[Model, ImageProcessor, Inference]":
        """The model, the processor and the options, checked."""
        from beit_jax.images.processor import ade20k_processor
        from beit_jax.inference import predict
        from beit_jax.inference.segmentation import Inference

        if self.slide and self.whole:
            raise BeitJaxError("--slide and --whole were both given; give one")
        mode: Literal["slide", "whole"] | None = "slide" if self.slide else "whole" if self.whole else None
        how = Inference(mode, scales=self.scales, flip=self.flip, batch_size=self.batch_size)
        model, processor = predict.from_pretrained(checkpoint, revision=hub.revision, cache_dir=hub.cache_dir)
        if model.config.task != "semantic_segmentation":
            raise BeitJaxError(f"{checkpoint}: does not segment (its task is {model.config.task})")
        return model, ade20k_processor(min(model.config.image_size)) if self.as_trained else processor, how


def demo(*, out: Path = Path("beit-jax-demo"), json: Json = False) -> int:
    """Convert the embedded digits classifier, compare it with PyTorch, classify images. Needs no network and no torch.

    The checkpoint was trained in PyTorch by transformers (tests/reference/make_digits.py).

    Try:
      beit-jax demo

    Args:
        out: Where the converted checkpoint is written; a result of an earlier demo there is replaced.
    """
    from beit_jax.cli import demo as demonstration

    result = demonstration.run(out, progress=byte_progress)
    if json:
        print_json(result.as_dict())
    else:
        print_lines(demonstration.describe(result))
    return 0 if result.passed else 1


def convert(
    source: Positional[SourceName],
    dest: Positional[Annotated[Path, arg(metavar="DEST", help="Directory to create: the native checkpoint.")]],
    *,
    overwrite: bool = False,
    json: Json = False,
    options: Annotated[Options, arg(name="")] = Options(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Convert a PyTorch checkpoint into a native one: config.json, preprocessor_config.json, flax_model.safetensors.

    Every tensor is used or known to be derived, every shape is checked before a byte is copied, and the result is
    verified before it appears under its name; a failed or interrupted conversion leaves nothing.

    Try:
      beit-jax convert microsoft/beit-large-patch16-224-pt22k beit-large
      beit-jax convert beit_base_patch16_224_pt22k.pth native --image-size 384 --position-bias per_layer
      beit-jax convert encoder.pkl dvae-encoder

    Args:
        overwrite: Replace DEST if it exists; it stays whole until the new one is complete.
    """
    from beit_jax.atomic import check_destination
    from beit_jax.cli.inspection import describe_plan, describe_tokenizer, plan_as_dict
    from beit_jax.convert import importer, tokenizers

    check_destination(dest, overwrite=overwrite)  # before anything is downloaded
    where = hub.resolve(source)
    if tokenizers.is_tokenizer(where, prefer=options.weights):
        tokenizer = tokenizers.convert(
            where, dest, overwrite=overwrite, prefer=options.weights, allow_nonfinite=options.allow_nonfinite
        )
        found = describe_tokenizer(tokenizer)
        if json:
            print_json(found.as_dict | {"destination": str(dest)})
        else:
            print_lines([*found.lines, f"written      {dest}"])
        return 0
    plan = importer.convert(where, dest, options, overwrite=overwrite, progress=byte_progress)
    if json:
        print_json(plan_as_dict(plan) | {"destination": str(dest)})
    else:
        print_lines([*describe_plan(plan), f"written      {dest}"])
    return 0


def export(
    native: Positional[Annotated[Path, arg(metavar="NATIVE", help="A native checkpoint.")]],
    dest: Positional[Annotated[Path, arg(metavar="DEST", help="Directory to create.")]],
    *,
    to: Literal["hf", "original", "timm"] = "hf",
    overwrite: bool = False,
) -> int:
    """Give a model back to PyTorch: the inverse of convert, through the same tables, bit for bit.

    hf: for transformers' from_pretrained. timm: for timm.create_model("local-dir:DEST"). original: checkpoint.pth for
    unilm's scripts (needs torch to write).

    Try:
      beit-jax export ./native ./for-transformers
      beit-jax export ./native ./for-timm --to timm

    Args:
        to: The layout.
        overwrite: Replace DEST if it exists; it stays whole until the new one is complete.
    """
    from beit_jax import weights
    from beit_jax.convert import exporter

    if not weights.is_native(native):
        raise BeitJaxError(f"{printable(native)}: not a native checkpoint (no {weights.WEIGHTS}); convert it first")
    notes = exporter.export(weights.load(native), dest, to, overwrite=overwrite)
    print_lines([f"{dest}: written for {to}", *(f"note: {note}" for note in notes)])
    return 0


def published(*, json: Json = False) -> int:
    """List the published checkpoints: name, size, accuracy and where they are.

    Try:
      beit-jax list
      beit-jax list --json
    """
    from dataclasses import asdict as as_dict

    from beit_jax.published import PUBLISHED

    if json:
        print_json([as_dict(row) for row in PUBLISHED])
        return 0
    print_table(
        ["name", "variant", "format", "result", "where"],
        [[row.name, row.variant or "-", row.format, row.result or "-", row.where] for row in PUBLISHED],
    )
    return 0


def inspect(
    source: Positional[SourceName],
    *,
    tensors: bool = False,
    json: Json = False,
    options: Annotated[Options, arg(name="")] = Options(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Say what a checkpoint is and whether it can be converted, without reading its tensors.

    Try:
      beit-jax inspect microsoft/beit-base-patch16-224
      beit-jax inspect ./native --tensors

    Args:
        tensors: List every tensor with its shape and dtype.
    """
    from beit_jax.cli import inspection

    found = inspection.inspect(hub.resolve(source), options, tensors=tensors)
    if json:
        print_json(found.as_dict)
    else:
        print_lines(found.lines)
    return 0


def parity(
    source: Positional[SourceName],
    *,
    image: tuple[Path, ...] = (),
    batch: int = 2,
    seed: int = 0,
    json: Json = False,
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Run transformers and the converted model on the same input and compare stage by stage.

    Exit code 1 on a difference. Needs torch and transformers: pip install 'beit-jax[torch]'.

    Try:
      beit-jax parity microsoft/beit-base-patch16-224
      beit-jax parity ./directory --image cat.jpg dog.jpg

    Args:
        image: Images to compare on; by default BATCH images of noise.
        batch: How many images of noise.
        seed: Of the noise and the masked patches.
    """
    from beit_jax import weights
    from beit_jax.convert import parity as comparison
    from beit_jax.images.processor import ImageProcessor

    where = hub.resolve(source)
    if where.path.is_dir() and weights.is_native(where.path):
        raise BeitJaxError(f"{source}: a native checkpoint; give the Hugging Face directory it was converted from")
    pixels = ImageProcessor.from_file(where.directory / weights.PROCESSOR)(list(image)) if image else None
    stages = comparison.check(where, pixels, seed=seed, batch=batch)
    if json:
        print_json([stage.as_dict() for stage in stages])
    else:
        print_table(
            ["stage", "max error", "mean error", "scale", "tolerance", "verdict"],
            [
                [s.name, f"{s.max_error:.1e}", f"{s.mean_error:.1e}", f"{s.scale:.3g}", f"{s.tolerance:.1e}",
                 "equal" if s.passed else "DIFFERENT"]
                for s in stages
            ],
        )  # fmt: skip
        different = [stage.name for stage in stages if not stage.passed]
        print_lines([f"first difference at {different[0]}" if different else "all stages agree with PyTorch"])
    return 0 if all(stage.passed for stage in stages) else 1


def classify(
    checkpoint: Positional[SourceName],
    images: Positional[_Images],
    *,
    top: int = 5,
    batch_size: int = 8,
    json: Json = False,
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Print the most probable classes of images.

    Try:
      beit-jax classify microsoft/beit-base-patch16-224 cat.jpg --top 3
      beit-jax classify ./native *.png --json

    Args:
        top: Classes per image.
        batch_size: Images computed at once.
    """
    _require_images(images)
    predictor = _predictor(checkpoint, hub)
    guesses = predictor.classify(images, top=top, batch_size=batch_size)
    if json:
        named = zip(images, guesses, strict=True)
        print_json([{"image": str(path), "classes": [asdict(guess) for guess in best]} for path, best in named])
        return 0
    rows = [
        [printable(path, 60) if i == 0 else "", f"{guess.probability:.4f}", printable(guess.label, 60)]
        for path, best in zip(images, guesses, strict=True)
        for i, guess in enumerate(best)
    ]
    print_table(["image", "probability", "class"], rows)
    return 0


def features(
    checkpoint: Positional[SourceName],
    images: Positional[_Images],
    *,
    output: Annotated[Path, arg(aliases=["-o"])],
    pooling: Literal["pooled", "mean", "cls", "tokens"] = "pooled",
    batch_size: int = 8,
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Write the features of images to a NumPy .npz file.

    The file holds `features`, one float32 row per image, and `images`, their names.

    Try:
      beit-jax features facebook/data2vec-vision-base *.jpg -o features.npz
      beit-jax features ./native *.png -o tokens.npz --pooling tokens

    Args:
        output: The file to write, ending in .npz.
        pooling: What the model pools itself (or the mean of the patch tokens where it pools nothing), the mean, the
            class token, or all tokens.
        batch_size: Images computed at once.
    """
    import numpy as np

    from beit_jax.atomic import new_file

    _require_images(images)
    if output.suffix != ".npz":
        raise BeitJaxError(f"{output}: expected a name ending in .npz")
    predictor = _predictor(checkpoint, hub)
    with new_file(output) as partial, partial.open("wb") as file:
        found = predictor.features(images, pooling=pooling, batch_size=batch_size)
        np.savez(file, features=found, images=np.array([str(path) for path in images]))
    print_lines([f"{output}: features {list(found.shape)} float32 of {len(images)} images"])
    return 0


def segment(
    checkpoint: Positional[SourceName],
    image: Positional[Annotated[Path, arg(metavar="IMAGE", help="Image file.")]],
    *,
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    mask: Path | None = None,
    opacity: float = 0.5,
    json: Json = False,
    how: Annotated[Segmenting, arg(name="")] = Segmenting(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Name the class of every pixel of an image: a picture with a legend, a label map, or both.

    Try:
      beit-jax segment microsoft/beit-base-finetuned-ade-640-640 room.jpg -o room-classes.png
      beit-jax segment ./native room.jpg --mask labels.png --as-trained --json

    Args:
        output: Picture to write: the image under the colours of its classes, and their names and areas.
        mask: PNG to write: the number of its class for every pixel.
        opacity: Of the colours, 0 to 1.
    """
    from beit_jax.atomic import new_file
    from beit_jax.images.files import open_image
    from beit_jax.images.label_maps import write_label_map
    from beit_jax.inference.segmentation import segment as run
    from beit_jax.looking import pictures

    if output is None and mask is None and not json:
        raise BeitJaxError("nothing to write: give --output PICTURE, --mask FILE or --json")
    if output is not None and output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BeitJaxError(f"{output}: expected a name ending in .png, .jpg or .webp")
    if mask is not None and mask.suffix.lower() != ".png":
        raise BeitJaxError(f"{mask}: expected a name ending in .png")
    if not 0.0 <= opacity <= 1.0:
        raise BeitJaxError(f"opacity {opacity}: expected 0 to 1")
    picture = open_image(image)
    model, processor, options = how.load(checkpoint, hub)
    labels, names = run(model, processor, picture, options), model.config.labels
    found = pictures.areas(labels, names)
    if output is not None:
        kind = {".png": "PNG", ".webp": "WEBP"}.get(output.suffix.lower(), "JPEG")
        with new_file(output) as partial:
            pictures.overlay(picture, labels, names, opacity=opacity).save(partial, format=kind)
    if mask is not None:
        with new_file(mask) as partial:
            write_label_map(labels, partial)
    if json:
        print_json({"image": str(image), "height": labels.shape[0], "width": labels.shape[1],
                     "classes": [asdict(area) for area in found]})  # fmt: skip
        return 0
    print_table(["class", "area"], [[printable(area.label, 60), f"{100 * area.share:.1f} %"] for area in found])
    print_lines([f"written      {printable(path, 1024)}" for path in (output, mask) if path is not None])
    return 0


def evaluate(
    checkpoint: Positional[SourceName],
    *,
    data: Annotated[Path | None, arg(metavar="DIR")] = None,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    annotations: Annotated[Path | None, arg(metavar="DIR")] = None,
    labels_from_zero: bool = False,
    json: Json = False,
    classifying: Annotated[Classifying, arg(name="")] = Classifying(),
    how: Annotated[Segmenting, arg(name="")] = Segmenting(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Score a checkpoint on labelled images: top-1 and top-5 of a classifier, or mIoU, mAcc and aAcc of segmentation.

    Try:
      beit-jax evaluate facebook/data2vec-vision-base-ft1k --data ./imagenet
      beit-jax evaluate ./native --data ./folder-per-class --preset unilm_eval --confusion mistakes.png
      beit-jax evaluate ./native --images ADE/images/validation --annotations ADE/annotations/validation --as-trained
      beit-jax evaluate ./native --images DIR --annotations DIR --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --as-trained

    Args:
        data: Of a classifier: what `beit-jax prepare` wrote, or a folder of images per class.
        images: Of segmentation: folder of images.
        annotations: Folder of PNG files with a class number for every pixel, named as their images.
        labels_from_zero: Annotations count classes from 0, and 255 is no class; ADE20K's own count from 1, and 0 is
            no class.
    """
    if data is not None and images is None and annotations is None:
        from beit_jax.inference import predict

        model, processor = predict.from_pretrained(checkpoint, revision=hub.revision, cache_dir=hub.cache_dir)
        return evaluate_classifier(model, processor, data, classifying, json=json)
    if data is not None or images is None or annotations is None:
        raise BeitJaxError("give --data to evaluate a classifier, or --images and --annotations for segmentation")
    return _evaluate_segmentation(checkpoint, images, annotations, labels_from_zero, json, how, hub)


def _evaluate_segmentation(
    checkpoint: str, images: Path, annotations: Path, labels_from_zero: bool, json: bool, how: Segmenting, hub: Hub
) -> int:
    from beit_jax.train.evaluation import segmentation as scoring

    scoring.paired(images, annotations)  # before a checkpoint is fetched for nothing
    model, processor, options = how.load(checkpoint, hub)
    scores = scoring.evaluate_folders(
        model, processor, images, annotations, options, reduce=not labels_from_zero, progress=image_progress
    )
    if json:
        print_json(scores.as_dict())
        return 0
    rows = [
        [
            printable(row["label"], 60),
            *("" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("iou", "accuracy")),
        ]
        for row in scores.as_dict()["classes"]
    ]
    print_table(["class", "IoU %", "accuracy %"], rows)
    print_lines(scoring.describe(scores))
    return 0


def reconstruct(
    checkpoint: Positional[SourceName],
    images: Positional[_Images],
    *,
    tokenizer: Annotated[Path, arg(metavar="DIR", help="Native dVAE encoder that the model was trained with.")],
    decoder: Annotated[Path, arg(metavar="DIR", help="Native dVAE decoder of the same tokens.")],
    output: Annotated[Path, arg(aliases=["-o"])] = Path("reconstruction.png"),
    mask_patches: int | None = None,
    seed: int = 0,
    json: Json = False,
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Hide patches of images from a pre-trained model and show what it predicts there, decoded to pixels.

    The picture has a row per image: what the model sees; the same with hidden patches; what the image's own tokens
    decode to; and that with the predicted tokens in the hidden places. Tokenizer and decoder are written by convert.

    Try:
      beit-jax reconstruct ./beit-base-pt22k cat.jpg --tokenizer ./dvae-encoder --decoder ./dvae-decoder
      beit-jax reconstruct ./native *.png --tokenizer ./encoder --decoder ./decoder --mask-patches 30 -o seen.png

    Args:
        output: Picture to write, ending in .png.
        mask_patches: Patches to hide of every image; by default 75 of 196, as BEiT was trained, or as large a share.
        seed: Of the hidden patches.
    """
    from beit_jax.inference import predict
    from beit_jax.looking import reconstruct as reconstructing
    from beit_jax.tokenizers.tokenizer import load_decoder, load_tokenizer
    from beit_jax.train.augmentation.masking import BlockMask
    from beit_jax.train.recipe import MaskOptions

    _require_images(images)
    reconstructing.check_output(output)
    parts = load_tokenizer(tokenizer), load_decoder(decoder)
    model, processor = predict.from_pretrained(checkpoint, revision=hub.revision, cache_dir=hub.cache_dir)
    grid = model.config.grid
    patches = grid[0] * grid[1]
    count = round(patches * 75 / 196) if mask_patches is None else mask_patches
    if not 1 <= count <= patches:
        raise BeitJaxError(f"--mask-patches: expected 1 to {patches}, the patches of an image, found {count}")
    mask = BlockMask(grid, MaskOptions(count, min_block=max(1, round(patches * 16 / 196)), exact=True))
    found = reconstructing.reconstruct_files(model, processor, *parts, images, mask, seed=seed, output=output)
    if json:
        print_json(found.as_dict(images) | {"output": str(output)})
        return 0
    counts = zip(images, found.hidden, found.right, strict=True)
    print_table(
        ["image", "hidden", "predicted right"],
        [[printable(path, 60), f"{hidden}", f"{right}"] for path, hidden, right in counts],
    )
    print_lines(
        [
            f"{100 * found.correct:.1f} % of the hidden tokens were predicted right",
            f"written      {printable(output, 1024)}",
        ]
    )
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "list": published,
    "inspect": inspect,
    "convert": convert,
    "parity": parity,
    "classify": classify,
    "features": features,
    "segment": segment,
    "evaluate": evaluate,
    "export": export,
    "reconstruct": reconstruct,
    "plot": plot,
    "prepare": prepare,
}


# Their help is that of the recipe that the arguments name.
RECIPE_COMMANDS = {"train": train_command, "tokenize": tokenize_command, "aot": aot_command}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Its exit code: 0; 1 if a comparison fails or nobody reads on; 2 for the user's mistakes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` blocks clean up
    if arguments is None:  # this process is the command's own
        arguments = sys.argv[1:]
        keep_freed_memory()
        atexit.register(leave_objects)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            COMMANDS | {name: build(arguments) for name, build in RECIPE_COMMANDS.items()},
            prog="beit-jax",
            description="BEiT and Data2Vec-Vision in JAX: convert PyTorch checkpoints, prove them equal, use them. "
            "Begin with: beit-jax demo",
            args=arguments,
            config=(FlagCreatePairsOff,),
        )
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not reader_left():
            raise
        return 1
    except BeitJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130


def _predictor(checkpoint: str, hub: Hub) -> "Predictor":
    with imports():
        from beit_jax.inference import program_cache as kept
        from beit_jax.inference.reading import read
    return kept.predictor(read(hub.resolve(checkpoint)))


def _require_images(images: Sequence[Path]) -> None:
    if not images:
        raise BeitJaxError("no images given; name at least one file")


if __name__ == "__main__":
    sys.exit(main())
