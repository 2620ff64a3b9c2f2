"""Commands on images: `classify`, `features`, `segment` and `reconstruct`. Imports wait until one runs."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import (
    Hub,
    Inputs,
    Json,
    ScaleArguments,
    SegmentationArguments,
    SkipBad,
    SourceName,
    refuse_given,
    require_counts,
)
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.listing import named_images
from beit_jax.memory import imports
from beit_jax.terminal import image_progress, print_json, print_lines, print_table

if TYPE_CHECKING:
    from beit_jax.bulk.inputs import Listing
    from beit_jax.bulk.segmenting import Loaded
    from beit_jax.bulk.table import Host, Making, Outcome
    from beit_jax.bulk.tasks import Computing, Task
    from beit_jax.bulk.work import Work
    from beit_jax.inference.predictor import Guess, Pooling, Predictor


def classify(
    checkpoint: Positional[SourceName],
    images: Positional[Inputs],
    *,
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="TABLE", help_behavior_hint="")] = None,
    top: int = 5,
    batch_size: int = 8,
    json: Json = False,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    scale: Annotated[ScaleArguments, arg(name="")] = ScaleArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Print the most probable classes of images.

    Of many images, --output writes a table. A command that was stopped goes on where it was when it is given again.

    Try:
      beit-jax classify microsoft/beit-base-patch16-224 cat.jpg --top 3
      beit-jax classify ./native *.png --json
      beit-jax classify ./native ./folder -o classes.jsonl --skip-bad

    Args:
        output: Table to write, ending in .jsonl, .csv, .parquet or .arrow.
        top: Classes per image. A model of regression has none: all its values are printed.
        batch_size: Images computed at once.
    """
    require_counts(top=top, batch_size=batch_size)
    if output is not None:
        if json:
            raise BeitJaxError("--json prints, and --output writes a table; leave one of them out")
        return _classify_to_table(checkpoint, images, output, top, batch_size, skip, scale, hub)
    refuse_given(replace(scale, workers=None, members=()), "of a table; give --output")
    if all(map(_is_plain, images)):
        refuse_given(scale, "for many images; these are single files")
        files = named_images(map(Path, images))
        bad = BadImages(len(files), skip.share())
        predictor = _predictor(checkpoint, hub)
        with image_progress(len(files), "classifying", first="compiling") as advance:
            found = predictor.classify(files, top=top, batch_size=batch_size, bad=bad, advance=advance)
        guesses = dict(zip(bad.kept(range(len(files))), cast("list[list[Guess]]", found), strict=True))
        rows = [_as_row(path, guesses.get(place), bad.reasons.get(place)) for place, path in enumerate(files)]
        regression = predictor.config.score_function is None
    else:
        scale.check()
        work = _classifying(checkpoint, hub, _listed(images, scale), top, batch_size, scale, skip)
        bad = BadImages(len(work.listing), skip.share())
        rows = [dict(row) for part in work.parts([(0, len(work.listing))], bad) for row in part.rows]
        regression = work.computing.config.score_function is None
    if json:
        print_json(rows)
        return 0
    lines = [
        [printable(Path(row["image"])) if i == 0 else "", _score(guess), printable(guess["label"], 1024)]
        for row in rows
        for i, guess in enumerate(row.get("classes", ()))
    ]
    print_table(["image", *(("value", "output") if regression else ("probability", "class"))], lines)
    print_lines(bad.lines())
    return 0


def _is_plain(name: str) -> bool:
    """True for an image file, for which nothing else has to be imported; and for a name of nothing that is there."""
    if name in ("", "-") or name.startswith("tfds:") or os.path.isdir(name):
        return False
    special = name.lower().endswith((".txt", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz"))
    return not special and (os.path.exists(name) or not set(name) & set("*?[{@#"))


def _classify_to_table(
    checkpoint: str,
    images: tuple[str, ...],
    output: Path,
    top: int,
    batch_size: int,
    skip: SkipBad,
    scale: ScaleArguments,
    hub: Hub,
) -> int:
    from beit_jax.bulk.table import check_output

    scale.check()
    listing = _listed(images, scale, output)
    check_output(output, listing)
    with scale.host() as host:
        work = _classifying(checkpoint, hub, listing, top, batch_size, scale, skip)
        outcome = _table(work, output, host)
    print_lines(ending(output, outcome, "classes"))
    return 0


def _classifying(
    checkpoint: str, hub: Hub, listing: "Listing", top: int, batch_size: int, scale: ScaleArguments, skip: SkipBad
) -> "Work":
    from beit_jax.bulk.tasks import Classes

    return _work(
        checkpoint, hub, lambda found: Classes(found.config, top), listing, batch_size, scale, skip, "classifying"
    )


def _score(guess: dict[str, Any]) -> str:
    return f"{guess['value']:.6g}" if "value" in guess else f"{guess['probability']:.4f}"


def features(
    checkpoint: Positional[SourceName],
    images: Positional[Inputs],
    *,
    output: Annotated[Path, arg(aliases=["-o"])],
    pooling: Literal["pooled", "mean", "cls", "tokens"] = "pooled",
    batch_size: int = 8,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    scale: Annotated[ScaleArguments, arg(name="")] = ScaleArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Write the features of any number of images to a table.

    The table has a row for every image: its name, and its features in float32. A command that was stopped goes on where
    it was when it is given again.

    Try:
      beit-jax features facebook/data2vec-vision-base *.jpg -o features.npz
      beit-jax features ./native ./folder -o tokens.npz --pooling tokens
      beit-jax features ./native "shards/{000..099}.tar" -o features.parquet --skip-bad

    Args:
        output: The file to write, ending in .npz, .safetensors, .parquet, .arrow, .csv or .jsonl.
        pooling: The model's own pooled output (the mean of the patch tokens if it pools nothing), the mean of the patch
            tokens, the class token, or all tokens.
        batch_size: Images computed at once.
    """
    from beit_jax.bulk.table import check_output

    require_counts(batch_size=batch_size)
    scale.check()
    listing = _listed(images, scale, output)
    check_output(output, listing)
    with scale.host() as host:
        work = _work(
            checkpoint, hub, lambda _: _features(pooling), listing, batch_size, scale, skip, "computing features"
        )
        outcome = _table(work, output, host)
    print_lines(ending(output, outcome, "features"))
    return 0


def _features(pooling: "Pooling") -> "Task":
    from beit_jax.bulk.tasks import Features

    return Features(pooling)


def segment(
    checkpoint: Positional[SourceName],
    images: Positional[Inputs],
    *,
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PICTURE", help_behavior_hint="")] = None,
    mask: Annotated[Path | None, arg(metavar="PNG", help_behavior_hint="")] = None,
    table: Annotated[Path | None, arg(metavar="TABLE", help_behavior_hint="")] = None,
    opacity: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")] = None,
    json: Json = False,
    segmentation: Annotated[SegmentationArguments, arg(name="")] = SegmentationArguments(),
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    scale: Annotated[ScaleArguments, arg(name="")] = ScaleArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Name the class of every pixel of an image: a picture with a legend, a label map, or both.

    Of several images, or a folder of them, --output and --mask name new folders of PNG files named as the images. With
    --table, a command that was stopped goes on where it was when it is given again.

    Try:
      beit-jax segment microsoft/beit-base-finetuned-ade-640-640 room.jpg -o room-classes.png
      beit-jax segment ./native room.jpg --mask labels.png --as-trained --json
      beit-jax segment ./native ./rooms --mask ./labels --table areas.jsonl --skip-bad

    Args:
        output: Picture to write: the image under the colours of its classes, with their names and areas.
        mask: PNG to write: the class number of every pixel.
        table: Table to write, ending in .jsonl, .csv, .parquet or .arrow: the classes of every image and their areas.
        opacity: Opacity of the colours, 0 to 1, by default 0.5.
    """
    from beit_jax.bulk import segmenting

    if output is None and mask is None and table is None and not json:
        raise BeitJaxError("nothing to write: give --output PICTURE, --mask FILE, --table FILE or --json")
    if opacity is not None and not 0.0 <= opacity <= 1.0:
        raise BeitJaxError(f"--opacity {opacity}: expected 0 to 1")
    if opacity is not None and output is None:
        raise BeitJaxError("--opacity is that of the colours in --output, which was not given; give both")
    if table is not None and json:
        raise BeitJaxError("--json prints, and --table writes a table; leave one of them out")
    segmentation.check()
    written = segmenting.Written(output, mask, 0.5 if opacity is None else opacity)

    def load() -> "Loaded":
        from beit_jax.bulk.devices import facts_of
        from beit_jax.inference.reading import read

        source = hub.resolve(checkpoint)
        found = read(source)
        return facts_of(source, found), *segmentation.of(checkpoint, found)

    scale.check()
    task = segmenting.Segmenting(load, skip.share(), scale.members, scale.chunk)
    if table is not None:
        refuse_given(ScaleArguments(workers=scale.workers), "segmenting prepares images itself")
        shared = scale.process is not None or scale.cluster
        print_lines(ending(table, task.to_table(images, table, written, scale.host(), shared=shared), "areas"))
        return 0
    refuse_given(replace(scale, members=()), "of a table; give --table")
    return task.printed(images, written, json=json)


def reconstruct(
    checkpoint: Positional[SourceName],
    images: Positional[Inputs],
    *,
    tokenizer: Annotated[str, arg(metavar="TOKENIZER", help="dVAE encoder that the model was trained with.")],
    decoder: Annotated[str, arg(metavar="DECODER", help="dVAE decoder of the same tokens.")],
    output: Annotated[Path, arg(aliases=["-o"])] = Path("reconstruction.png"),
    table: Annotated[Path | None, arg(metavar="TABLE", help_behavior_hint="")] = None,
    mask_patches: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None,
    seed: int = 0,
    json: Json = False,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    scale: Annotated[ScaleArguments, arg(name="")] = ScaleArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Hide patches of images from a pre-trained model and show what it predicts there, decoded to pixels.

    The picture has a row of four for every image: the image in the model's size; the same with hidden patches; the
    image's own tokens, decoded; the same with the predicted tokens in the hidden places. `beit-jax convert` writes
    tokenizer and decoder. Of many images, --table writes the numbers, and --output may name a new folder of pictures.

    Try:
      beit-jax reconstruct ./beit-base-pt22k cat.jpg --tokenizer ./dvae-encoder --decoder ./dvae-decoder
      beit-jax reconstruct ./native *.png --tokenizer ./encoder --decoder ./decoder --mask-patches 30 -o seen.png

    Args:
        output: Picture to write, ending in .png.
        table: Table to write, ending in .jsonl, .csv, .parquet or .arrow: the hidden tokens of every image, and how
            many were predicted right. A command that was stopped goes on where it was.
        mask_patches: Number of patches to hide in every image; by default 75 of 196, as in BEiT's training, or the same
            share of another number.
        seed: Seed of the choice of hidden patches.
    """
    from beit_jax.bulk.chunks import is_begun
    from beit_jax.bulk.devices import facts_of
    from beit_jax.bulk.reconstructing import Reconstructing
    from beit_jax.bulk.segmenting import Folder
    from beit_jax.bulk.table import Table, check_output
    from beit_jax.cli import sources
    from beit_jax.images.files import decode_image
    from beit_jax.inference import predict
    from beit_jax.inference.reading import read
    from beit_jax.looking import reconstruct as reconstructing
    from beit_jax.looking.written import check_picture
    from beit_jax.tokenizers.checkpoint import load_decoder, load_tokenizer
    from beit_jax.train.augmentation.masking import BlockMask
    from beit_jax.train.recipe import MaskOptions

    require_counts(mask_patches=mask_patches)
    if seed < 0:
        raise BeitJaxError(f"--seed {seed}: expected an integer of at least 0")
    scale.check()
    if table is None:
        refuse_given(replace(scale, members=()), "of a table; give --table")
        refuse_given(skip, "of a table; give --table")
    refuse_given(ScaleArguments(workers=scale.workers), "reconstructing prepares images itself")
    drawn = None if table is None or output == Path("reconstruction.png") else output
    listing = _listed(images, scale, table, drawn)
    files = [Path(name) for source in listing.sources for name in source.names()] if table is None else []
    if table is None:
        reconstructing.check_output(output)
        check_picture(output, "reconstruction.png", files)
    else:
        if json:
            raise BeitJaxError("--json prints, and --table writes a table; leave one of them out")
        check_output(table, listing)
    parts = (
        load_tokenizer(sources.tokenizer("tokenizer", tokenizer)),
        load_decoder(sources.tokenizer("decoder", decoder)),
    )
    source = hub.resolve(checkpoint)
    known = read(source)
    model, processor = predict.build(known), known.processor
    grid = model.config.grid
    patches = grid[0] * grid[1]
    count = round(patches * 75 / 196) if mask_patches is None else mask_patches
    if not 1 <= count <= patches:
        raise BeitJaxError(f"--mask-patches: expected 1 to {patches}, the patches of an image, found {count}")
    mask = BlockMask(grid, MaskOptions(count, min_block=max(1, round(patches * 16 / 196)), exact=True))
    if table is not None:
        folder = None if drawn is None else Folder(drawn, is_begun(table) or scale.process is not None)
        facts = {**facts_of(source, known), "tokenizer": tokenizer, "decoder": decoder, "mask patches": count}
        progress = partial(image_progress, description="reconstructing", first="compiling")
        making = Reconstructing(
            model, processor, *parts, mask, seed, listing, facts,
            None if folder is None else folder.save, progress, skip.share(), scale.chunk,
            None if drawn is None else str(drawn),
        )  # fmt: skip
        with scale.host() as host:
            work = Table(making, table, host)
            if folder is not None:
                work = replace(work, finish=folder.finish, discard=folder.discard)
            print_lines(ending(table, work.make(), "predictions"))
        return 0
    held = [
        decode_image(image.read(), printable(Path(image.name)))
        for image in (listing.images(0, len(listing)) if not all(map(os.path.isfile, files)) else ())
    ]
    found = reconstructing.reconstruct_files(
        model, processor, *parts, files, mask, seed=seed, output=output, images=held
    )
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


def _listed(images: tuple[str, ...], scale: ScaleArguments, *outputs: Path | None) -> "Listing":
    """The images that were named, without those in unfinished outputs.

    Raises:
        BeitJaxError: as `list_images`; an output cannot be made.
    """
    from beit_jax.atomic import check_place
    from beit_jax.bulk.chunks import folder_of
    from beit_jax.bulk.inputs import list_images

    named = [output for output in outputs if output is not None]
    for output in named:
        check_place(output)
    return list_images(images, members=scale.members, leave_out=map(folder_of, named))


def _work(
    checkpoint: str,
    hub: Hub,
    task: "Callable[[Computing], Task]",
    listing: "Listing",
    batch_size: int,
    scale: ScaleArguments,
    skip: SkipBad,
    description: str,
) -> "Work":
    with imports():
        from beit_jax.bulk.devices import computing
        from beit_jax.bulk.work import Options, Work
        from beit_jax.inference import program_cache

    found = computing(hub.resolve(checkpoint), partial(program_cache.predictor, many=True))
    options = Options(batch_size, scale.chunk, scale.workers, skip.share())
    progress = partial(image_progress, description=description, first="compiling")
    return Work(found, task(found), listing, options, progress)


def _table(making: "Making", output: Path, host: "Host") -> "Outcome":
    from beit_jax.bulk.table import Table

    return Table(making, output, host).make()


def ending(output: Path, outcome: "Outcome", what: str) -> list[str]:
    """The last lines of a command that writes a table of `what`."""
    lines = [f"left out     {reason}" for reason in outcome.bad]
    if not outcome.missing:
        shape = "" if outcome.shape is None else f" {list(outcome.shape)} float32"
        return [*lines, f"{printable(output)}: {what}{shape} of {outcome.images - len(outcome.bad)} images"]
    first = ", ".join(map(str, outcome.missing[:8])) + (", ..." if len(outcome.missing) > 8 else "")
    return [
        f"{printable(output)}: {len(outcome.missing)} parts of other processes are missing ({first}); whoever ends "
        "last joins the table, and a process that was lost can be started again"
    ]


def _as_row(path: Path, guesses: "list[Guess] | None", reason: str | None) -> dict[str, Any]:
    if guesses is None:
        return {"image": str(path), "error": reason}
    return {"image": str(path), "classes": [_filled(guess) for guess in guesses]}


def _filled(guess: "Guess") -> dict[str, Any]:
    """The fields of a guess that have a value: a probability or, in regression, the output."""
    return {key: value for key, value in asdict(guess).items() if value is not None}
