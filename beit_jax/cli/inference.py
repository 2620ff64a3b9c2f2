"""Commands on images: `classify`, `features`, `segment` and `reconstruct`. Imports wait until one runs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import Hub, ImageFiles, Json, SegmentationArguments, SourceName, require_images
from beit_jax.errors import BeitJaxError, printable
from beit_jax.memory import imports
from beit_jax.terminal import print_json, print_lines, print_table

if TYPE_CHECKING:
    from beit_jax.inference.predictor import Predictor


def classify(
    checkpoint: Positional[SourceName],
    images: Positional[ImageFiles],
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
    require_images(images)
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
    images: Positional[ImageFiles],
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
        pooling: The model's own pooled output (the mean of the patch tokens if it pools nothing), the mean of the patch
            tokens, the class token, or all tokens.
        batch_size: Images computed at once.
    """
    import numpy as np

    from beit_jax.atomic import new_file

    require_images(images)
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
    segmentation: Annotated[SegmentationArguments, arg(name="")] = SegmentationArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Name the class of every pixel of an image: a picture with a legend, a label map, or both.

    Try:
      beit-jax segment microsoft/beit-base-finetuned-ade-640-640 room.jpg -o room-classes.png
      beit-jax segment ./native room.jpg --mask labels.png --as-trained --json

    Args:
        output: Picture to write: the image under the colours of its classes, with their names and areas.
        mask: PNG to write: the class number of every pixel.
        opacity: Opacity of the colours, 0 to 1.
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
    model, processor, options = segmentation.load(checkpoint, hub)
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


def reconstruct(
    checkpoint: Positional[SourceName],
    images: Positional[ImageFiles],
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
    from beit_jax.looking import reconstruct as reconstructing
    from beit_jax.tokenizers.checkpoint import load_decoder, load_tokenizer
    from beit_jax.train.augmentation.masking import BlockMask
    from beit_jax.train.recipe import MaskOptions

    require_images(images)
    reconstructing.check_output(output)
    parts = load_tokenizer(tokenizer), load_decoder(decoder)
    model, processor = hub.load(checkpoint)
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


def _predictor(checkpoint: str, hub: Hub) -> "Predictor":
    with imports():
        from beit_jax.inference import program_cache
        from beit_jax.inference.reading import read
    return program_cache.predictor(read(hub.resolve(checkpoint)))
