"""The command `prepare`: data sets as training and evaluation read them. Imports wait until it runs."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import Json, SkipBad, Switch, refuse_given
from beit_jax.cli.extras import train_extra
from beit_jax.errors import BeitJaxError
from beit_jax.terminal import image_progress, print_json, print_lines

Kind = Literal["digits", "folder", "images", "imagenet", "imagenet22k", "ade20k"]


def prepare(
    kind: Positional[Annotated[Kind, arg(help="What SOURCE is.")]],
    paths: Positional[
        Annotated[tuple[Path, ...], arg(metavar="[SOURCE] DEST", help_behavior_hint="(SOURCE for all but digits)")]
    ],
    *,
    held_out: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")] = None,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    overwrite: Switch = False,
    json: Json = False,
) -> int:
    """Write a data set as `beit-jax train` and `evaluate` read it: TFDS in ArrayRecord files, without TensorFlow.

    SOURCE:
      digits       none: the digits are scikit-learn's
      folder       a tree with a folder per class, or with such trees in train/ and val/
      images       any tree of images, without labels, for pre-training
      imagenet     the folder of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit
      imagenet22k  a folder with a tar per class, or a tar of these
      ade20k       the folder ADEChallengeData2016

    Data that TFDS has prepared as array_record can be used as they are.

    Try:
      beit-jax prepare digits ./digits
      beit-jax prepare imagenet /downloads/imagenet ./imagenet

    Args:
        held_out: Share of the images for the validation split. For a folder without val/ it is taken from each class,
            0.1 by default; for images and imagenet22k it is 0 by default. The other kinds have their own.
        overwrite: Replace DEST if it exists. The old one stays until the new one is complete.
    """
    share = skip.share()
    if kind == "digits":
        refuse_given(skip, "the digits are in memory, none is bad")
    if held_out is not None:
        if kind not in ("folder", "images", "imagenet22k"):
            raise BeitJaxError(f"--held-out {held_out}: {kind} has a validation split; leave the option out")
        if not 0.0 <= held_out < 1.0:
            raise BeitJaxError(f"--held-out {held_out}: expected a share from 0 to below 1")
    with train_extra():
        from beit_jax.train.data import prepare as preparing

    names = "DEST" if kind == "digits" else "SOURCE DEST"
    if len(paths) != len(names.split()):
        raise BeitJaxError(f"prepare {kind}: expected {names}, found {len(paths)} names")
    progress = partial(image_progress, description="preparing")
    source, dest = paths[0], paths[-1]
    if kind == "digits":
        done = preparing.prepare_digits(dest, progress, overwrite=overwrite)
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
    left_out = [f"left out     {line}" for line in done.left_out]
    print_lines([*left_out, f"written      {done.directory}: {splits}; {len(done.labels):,} classes"])
    return 0
