"""The command `prepare`: data sets as training and evaluation read them. Imports wait until it runs."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import Json, SkipBad, Switch, TableArguments, refuse_given
from beit_jax.errors import BeitJaxError, needs_extra
from beit_jax.terminal import image_progress, print_json, print_lines

Kind = Literal["digits", "folder", "table", "images", "imagenet", "imagenet22k", "ade20k", "segmentation"]


@dataclass(frozen=True)
class MaskArguments:
    """What the numbers or colours of masks mean, and how images and masks are paired; for `segmentation`.

    Every mask has its image's name. Masks are PNG (also with a palette), TIFF, BMP or GIF of class numbers, or .npy.
    """

    labels: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Class names: a name in each line from number 0 on (from 1 with --labels-from-one), lines or CSV of
    number and name, or JSON of names or of numbers and names, such as a config.json. By default LABEL_0 to the largest
    number."""
    colors: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Masks hold colours: a line NAME,R,G,B for each, or JSON of names and [r, g, b]."""
    ignore: Annotated[tuple[str, ...], arg(metavar="NUMBER|NAME...", help_behavior_hint="")] = ()
    """Numbers or names of no class, besides 255 where it has no name."""
    labels_from_one: bool = False
    """0 is no class: the background does not count."""
    binary: bool = False
    """Two classes: 0, and 255 or 1. JPEG masks are divided at 128."""
    image_suffix: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """The end of images' names, before .jpg, that their masks do not have: _leftImg8bit."""
    mask_suffix: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """The end of masks' names, before .png, that their images do not have: _mask, _gtFine_labelIds. Other files are
    left out."""
    only_annotated: bool = False
    """Leave out images without a mask."""


def prepare(
    kind: Positional[Annotated[Kind, arg(help="What SOURCE is.")]],
    paths: Positional[
        Annotated[tuple[Path, ...], arg(metavar="[SOURCE...] DEST", help_behavior_hint="(SOURCE for all but digits)")]
    ],
    *,
    held_out: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")] = None,
    table: Annotated[TableArguments, arg(name="")] = TableArguments(),
    masks: Annotated[MaskArguments, arg(name="")] = MaskArguments(),
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    overwrite: Switch = False,
    json: Json = False,
) -> int:
    """Write a data set as `beit-jax train` and `evaluate` read it: TFDS in ArrayRecord files, without TensorFlow.

    SOURCE:
      digits       none: the digits are scikit-learn's
      folder       a tree with a folder per class, or with such trees in train/ and val/
      table        a row for every image: CSV, TSV or JSON lines, or a folder with its metadata.csv or metadata.jsonl
      images       any tree of images, without labels, for pre-training
      imagenet     the folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit
      imagenet22k  a folder with a tar per class, or a tar of these
      ade20k       the folder ADEChallengeData2016
      segmentation two: a tree of images and a tree of masks with their names, both with train/ and val/, or neither

    Data that TFDS has prepared as array_record can be used as they are.

    Try:
      beit-jax prepare digits ./digits
      beit-jax prepare imagenet /downloads/imagenet ./imagenet
      beit-jax prepare table ./photos/labels.csv ./data --image-column file --label-columns tags --separator ,
      beit-jax prepare table ./plants ./data --value-columns height weight
      beit-jax prepare segmentation ./photos ./masks ./data --labels names.txt

    Args:
        held_out: Share of the images for the validation split. For a folder without val/ it is taken from each class,
            0.1 by default, and for segmentation or a table without it from all, or from each class of a table of
            one class for each image; for images and imagenet22k it is 0 by default. The other kinds have their own.
        overwrite: Replace DEST if it exists. The old one stays until the new one is complete.
    """
    share = skip.share()
    if kind == "digits":
        refuse_given(skip, "the digits are in memory, none is bad")
    if held_out is not None:
        if kind not in ("folder", "table", "images", "imagenet22k", "segmentation"):
            raise BeitJaxError(f"--held-out {held_out}: {kind} has a validation split; leave the option out")
        if not 0.0 <= held_out < 1.0:
            raise BeitJaxError(f"--held-out {held_out}: expected a share from 0 to below 1")
    if kind != "table":
        refuse_given(table, "for a table with a row for every image")
    if kind != "segmentation":
        refuse_given(masks, "for segmentation")
    with needs_extra("train"):
        from beit_jax.train.data import prepare as preparing
        from beit_jax.train.data.masks import MaskFiles

    names = {"digits": "DEST", "segmentation": "IMAGES MASKS DEST"}.get(kind, "SOURCE DEST")
    if len(paths) != len(names.split()):
        raise BeitJaxError(f"prepare {kind}: expected {names}, found {len(paths)} names")
    progress = partial(image_progress, description="preparing")
    source, dest = paths[0], paths[-1]
    if kind == "digits":
        done = preparing.prepare_digits(dest, progress, overwrite=overwrite)
    elif kind == "table":
        done = preparing.prepare_table(
            *(source, dest, table.options(), progress),
            held_out=held_out,
            overwrite=overwrite,
            skip_bad=skip.skip_bad,
            max_bad=share,
        )
    elif kind == "segmentation":
        files = MaskFiles(
            masks.labels,
            masks.colors,
            masks.ignore,
            masks.labels_from_one,
            masks.binary,
            masks.image_suffix or "",
            masks.mask_suffix or "",
            masks.only_annotated,
        )
        done = preparing.prepare_segmentation(
            *(source, paths[1], dest, files, progress),
            held_out=held_out,
            overwrite=overwrite,
            skip_bad=skip.skip_bad,
            max_bad=share,
        )
    else:
        done = preparing.prepare(
            kind,
            source,
            dest,
            progress,
            held_out=held_out,
            overwrite=overwrite,
            skip_bad=skip.skip_bad,
            max_bad=share,
        )
    if json:
        print_json(asdict(done) | {"directory": str(done.directory)})
        return 0
    splits = ", ".join(f"{name} {count:,}" for name, count in done.splits.items())
    left_out = [f"left out     {line}" for line in done.left_out] + [f"note         {line}" for line in done.notes]
    print_lines([*left_out, f"written      {done.directory}: {splits}; {len(done.labels):,} {done.unit}"])
    return 0
