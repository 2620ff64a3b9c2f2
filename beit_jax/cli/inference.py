"""Commands on images: `classify`, `features`, `segment` and `reconstruct`. Imports wait until one runs."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import (
    Hub,
    ImageFiles,
    Json,
    SegmentationArguments,
    SkipBad,
    SourceName,
    require_counts,
)
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.listing import named_images
from beit_jax.memory import imports
from beit_jax.terminal import image_progress, print_json, print_lines, print_table

if TYPE_CHECKING:
    from beit_jax.inference.predictor import Guess, Predictor


def classify(
    checkpoint: Positional[SourceName],
    images: Positional[ImageFiles],
    *,
    top: int = 5,
    batch_size: int = 8,
    json: Json = False,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Print the most probable classes of images.

    Try:
      beit-jax classify microsoft/beit-base-patch16-224 cat.jpg --top 3
      beit-jax classify ./native *.png --json
      beit-jax classify ./native ./folder --skip-bad

    Args:
        top: Classes per image. A model of regression has none: all its values are printed.
        batch_size: Images computed at once.
    """
    require_counts(top=top, batch_size=batch_size)
    files = named_images(images)
    bad = BadImages(len(files), skip.share())
    predictor = _predictor(checkpoint, hub)
    with image_progress(len(files), "classifying", first="compiling") as advance:
        found = predictor.classify(files, top=top, batch_size=batch_size, bad=bad, advance=advance)
    guesses = dict(zip(bad.kept(range(len(files))), cast("list[list[Guess]]", found), strict=True))
    if json:
        print_json([_as_json(path, guesses.get(place), bad.reasons.get(place)) for place, path in enumerate(files)])
        return 0
    rows = [
        [printable(files[place]) if i == 0 else "", _score(guess), printable(guess.label, 1024)]
        for place, best in guesses.items()
        for i, guess in enumerate(best)
    ]
    regression = predictor.config.score_function is None
    print_table(["image", *(("value", "output") if regression else ("probability", "class"))], rows)
    print_lines(bad.lines())
    return 0


def _score(guess: "Guess") -> str:
    return f"{guess.value:.6g}" if guess.probability is None else f"{guess.probability:.4f}"


def features(
    checkpoint: Positional[SourceName],
    images: Positional[ImageFiles],
    *,
    output: Annotated[Path, arg(aliases=["-o"])],
    pooling: Literal["pooled", "mean", "cls", "tokens"] = "pooled",
    batch_size: int = 8,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Write the features of images to a NumPy .npz file.

    The file holds `features`, one float32 row per image, and `images`, their names.

    Try:
      beit-jax features facebook/data2vec-vision-base *.jpg -o features.npz
      beit-jax features ./native ./folder -o tokens.npz --pooling tokens

    Args:
        output: The file to write, ending in .npz.
        pooling: The model's own pooled output (the mean of the patch tokens if it pools nothing), the mean of the patch
            tokens, the class token, or all tokens.
        batch_size: Images computed at once.
    """
    import numpy as np

    from beit_jax.atomic import new_file

    require_counts(batch_size=batch_size)
    if output.suffix != ".npz":
        raise BeitJaxError(f"{printable(output)}: expected a name ending in .npz")
    files = named_images(images)
    bad = BadImages(len(files), skip.share())
    with new_file(output, inputs=files) as partial, partial.open("wb") as file:
        predictor = _predictor(checkpoint, hub)
        with image_progress(len(files), "computing features", first="compiling") as advance:
            found = predictor.features(files, pooling=pooling, batch_size=batch_size, bad=bad, advance=advance)
        np.savez(file, features=found, images=np.array([str(path) for path in bad.kept(files)]))
    print_lines([*bad.lines(), f"{printable(output)}: features {list(found.shape)} float32 of {len(found)} images"])
    return 0


def segment(
    checkpoint: Positional[SourceName],
    images: Positional[ImageFiles],
    *,
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PICTURE", help_behavior_hint="")] = None,
    mask: Annotated[Path | None, arg(metavar="PNG", help_behavior_hint="")] = None,
    opacity: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")] = None,
    json: Json = False,
    segmentation: Annotated[SegmentationArguments, arg(name="")] = SegmentationArguments(),
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Name the class of every pixel of an image: a picture with a legend, a label map, or both.

    Of several images, or a folder of them, --output and --mask name new folders of PNG files named as the images.

    Try:
      beit-jax segment microsoft/beit-base-finetuned-ade-640-640 room.jpg -o room-classes.png
      beit-jax segment ./native room.jpg --mask labels.png --as-trained --json
      beit-jax segment ./native ./rooms --mask ./labels --skip-bad

    Args:
        output: Picture to write: the image under the colours of its classes, with their names and areas.
        mask: PNG to write: the class number of every pixel.
        opacity: Opacity of the colours, 0 to 1, by default 0.5.
    """
    from beit_jax.images.bands import check_bands, load, visible
    from beit_jax.images.files import read_image_file
    from beit_jax.images.label_maps import write_label_map
    from beit_jax.inference.segmentation import segment as run
    from beit_jax.looking import pictures
    from beit_jax.looking.segmented import Outputs

    if output is None and mask is None and not json:
        raise BeitJaxError("nothing to write: give --output PICTURE, --mask FILE or --json")
    if opacity is not None and not 0.0 <= opacity <= 1.0:
        raise BeitJaxError(f"--opacity {opacity}: expected 0 to 1")
    if opacity is not None and output is None:
        raise BeitJaxError("--opacity is that of the colours in --output, which was not given; give both")
    files = named_images(images)
    several = len(files) > 1 or images[0].is_dir()
    outputs = Outputs(output, mask, files, folders=several)
    bad = BadImages(len(files), skip.share())
    if not several:
        check_bands(read_image_file(files[0]), printable(files[0]))  # before a checkpoint is fetched for nothing
    found: list[dict[str, Any]] = []
    with outputs.open() as (picture_of, mask_of):
        model, processor, options = segmentation.load(checkpoint, hub)
        names, seen = model.config.labels, replace(processor, bands=None)
        with image_progress(len(files), first="compiling") as advance:
            for place, path in enumerate(files):
                try:
                    picture = load(path, processor.num_channels, printable(path), select=processor.bands)
                except BeitJaxError as error:
                    bad.note(place, error)
                else:
                    labels = run(model, seen, picture, options)
                    found.append({"image": str(path), "height": labels.shape[0], "width": labels.shape[1],
                                  "classes": pictures.areas(labels, names)})  # fmt: skip
                    if picture_of is not None:
                        shown, share = visible(picture), 0.5 if opacity is None else opacity
                        drawn = pictures.overlay(shown, labels, names, opacity=share)
                        drawn.save(picture_of(path), format=outputs.format)
                    if mask_of is not None:
                        write_label_map(labels, mask_of(path))
                advance(1)
    if json:
        rows = [entry | {"classes": [asdict(area) for area in entry["classes"]]} for entry in found]
        rows += [{"image": str(files[place]), "error": reason} for place, reason in bad.reasons.items()]
        print_json(rows if several else rows[0])
        return 0
    head = ["image"] if several else []
    print_table([*head, "class", "area"], [row[1 - len(head) :] for entry in found for row in _area_rows(entry)])
    print_lines(bad.lines() + [f"written      {printable(path)}" for path in (output, mask) if path is not None])
    return 0


def reconstruct(
    checkpoint: Positional[SourceName],
    images: Positional[ImageFiles],
    *,
    tokenizer: Annotated[str, arg(metavar="TOKENIZER", help="dVAE encoder that the model was trained with.")],
    decoder: Annotated[str, arg(metavar="DECODER", help="dVAE decoder of the same tokens.")],
    output: Annotated[Path, arg(aliases=["-o"])] = Path("reconstruction.png"),
    mask_patches: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None,
    seed: int = 0,
    json: Json = False,
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Hide patches of images from a pre-trained model and show what it predicts there, decoded to pixels.

    The picture has a row of four for every image: the image in the model's size; the same with hidden patches; the
    image's own tokens, decoded; the same with the predicted tokens in the hidden places. `beit-jax convert` writes
    tokenizer and decoder.

    Try:
      beit-jax reconstruct ./beit-base-pt22k cat.jpg --tokenizer ./dvae-encoder --decoder ./dvae-decoder
      beit-jax reconstruct ./native *.png --tokenizer ./encoder --decoder ./decoder --mask-patches 30 -o seen.png

    Args:
        output: Picture to write, ending in .png.
        mask_patches: Number of patches to hide in every image; by default 75 of 196, as in BEiT's training, or the same
            share of another number.
        seed: Seed of the choice of hidden patches.
    """
    from beit_jax.cli import sources
    from beit_jax.looking import reconstruct as reconstructing
    from beit_jax.looking.written import check_picture
    from beit_jax.tokenizers.checkpoint import load_decoder, load_tokenizer
    from beit_jax.train.augmentation.masking import BlockMask
    from beit_jax.train.recipe import MaskOptions

    require_counts(mask_patches=mask_patches)
    if seed < 0:
        raise BeitJaxError(f"--seed {seed}: expected an integer of at least 0")
    files = named_images(images)
    reconstructing.check_output(output)
    check_picture(output, "reconstruction.png", files)
    parts = (
        load_tokenizer(sources.tokenizer("tokenizer", tokenizer)),
        load_decoder(sources.tokenizer("decoder", decoder)),
    )
    model, processor = hub.load(checkpoint)
    grid = model.config.grid
    patches = grid[0] * grid[1]
    count = round(patches * 75 / 196) if mask_patches is None else mask_patches
    if not 1 <= count <= patches:
        raise BeitJaxError(f"--mask-patches: expected 1 to {patches}, the patches of an image, found {count}")
    mask = BlockMask(grid, MaskOptions(count, min_block=max(1, round(patches * 16 / 196)), exact=True))
    found = reconstructing.reconstruct_files(model, processor, *parts, files, mask, seed=seed, output=output)
    if json:
        print_json(found.as_dict(files) | {"output": str(output)})
        return 0
    counts = zip(files, found.hidden, found.right, strict=True)
    print_table(
        ["image", "hidden", "predicted right"],
        [[printable(path), f"{hidden}", f"{right}"] for path, hidden, right in counts],
    )
    print_lines(
        [
            f"{100 * found.correct:.1f} % of the hidden tokens were predicted right",
            f"written      {printable(output)}",
        ]
    )
    return 0


def _predictor(checkpoint: str, hub: Hub) -> "Predictor":
    with imports():
        from beit_jax.inference import program_cache
        from beit_jax.inference.reading import read
        from beit_jax.programs.manifest import is_program
    source = hub.resolve(checkpoint)
    if is_program(source.path):
        from beit_jax.programs.program import load_program

        return load_program(source.path).predictor
    return program_cache.predictor(read(source))


def _as_json(path: Path, guesses: "list[Guess] | None", reason: str | None) -> dict[str, Any]:
    if guesses is None:
        return {"image": str(path), "error": reason}
    return {"image": str(path), "classes": [_filled(guess) for guess in guesses]}


def _filled(guess: "Guess") -> dict[str, Any]:
    """The fields of a guess that have a value: a probability or, in regression, the output."""
    return {key: value for key, value in asdict(guess).items() if value is not None}


def _area_rows(entry: dict[str, Any]) -> list[list[str]]:
    """The rows of an image: its name, once, and the name and the area of every class."""
    return [
        [printable(entry["image"], 1024) if i == 0 else "", printable(area.label, 1024), f"{100 * area.share:.1f} %"]
        for i, area in enumerate(entry["classes"])
    ]
