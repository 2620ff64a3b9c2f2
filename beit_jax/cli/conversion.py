"""Commands on checkpoints: `demo`, `inspect`, `convert`, `export` and `parity`. Imports wait until one runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import Hub, Json, SourceName, Switch, refuse_given, require_counts
from beit_jax.convert.formats import LAYOUTS, Layout
from beit_jax.convert.options import Options
from beit_jax.errors import BeitJaxError, printable
from beit_jax.programs.options import TARGETS, ProgramOptions, refuse_unused
from beit_jax.publishing.options import PushOptions
from beit_jax.terminal import byte_progress, print_json, print_lines, print_table

if TYPE_CHECKING:
    Target = str
else:
    Target = Literal[(Layout, *TARGETS)]


def demo(*, out: Path = Path("beit-jax-demo"), json: Json = False) -> int:
    """Convert the embedded digits classifier, compare it with PyTorch, classify images. Needs no network and no torch.

    The checkpoint was trained in PyTorch by transformers (tests/reference/make_digits.py).

    Try:
      beit-jax demo

    Args:
        out: Directory to create: the converted checkpoint. The result of an earlier demo is replaced.
    """
    from beit_jax.cli import demo as demonstration

    result = demonstration.run(out, progress=byte_progress)
    if json:
        print_json(result.as_dict())
    else:
        print_lines(demonstration.describe(result))
    return 0 if result.passed else 1


def inspect(
    source: Positional[SourceName],
    *,
    tensors: Switch = False,
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
    from beit_jax.weights.native import is_native

    where = hub.resolve(source)
    if where.path.is_dir() and is_native(where.path):
        refuse_given(options, f"{printable(source)} is native, and is read as it is")
    found = inspection.inspect(where, options, tensors=tensors)
    if json:
        print_json(found.as_dict)
    else:
        print_lines(found.lines)
    return 0


def convert(
    source: Positional[
        Annotated[
            str,
            arg(
                metavar="SOURCE",
                help="A directory in Hugging Face format, a weight file, or a hub name; not what is native already.",
            ),
        ]
    ],
    dest: Positional[Annotated[Path, arg(metavar="DEST", help="Directory to create: the native checkpoint.")]],
    *,
    overwrite: Switch = False,
    json: Json = False,
    options: Annotated[Options, arg(name="")] = Options(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Convert a PyTorch checkpoint into a native one: config.json, preprocessor_config.json, flax_model.safetensors.

    Every tensor must be used or be known as derived, and all shapes are checked before a byte is copied. The result is
    verified before it appears under its name. A conversion that fails or is interrupted leaves nothing.

    Try:
      beit-jax convert microsoft/beit-large-patch16-224-pt22k beit-large
      beit-jax convert beit_base_patch16_224_pt22k.pth native --image-size 384 --position-bias per_layer
      beit-jax convert microsoft/beit-base-patch16-224-pt22k-ft22k birds --labels birds.txt
      beit-jax convert encoder.pkl dvae-encoder

    Args:
        overwrite: Replace DEST if it is a native checkpoint. The old one stays until the new one is complete.
    """
    from beit_jax.atomic import check_destination
    from beit_jax.cli.inspection import describe_plan, describe_tokenizer_plan, plan_as_dict
    from beit_jax.convert import importer, tokenizers
    from beit_jax.weights.native import NATIVE

    check_destination(dest, overwrite=overwrite, contents=NATIVE)  # before anything is downloaded
    where = hub.resolve(source)
    if tokenizers.is_tokenizer(where, options):
        decided = tokenizers.convert(where, dest, options, overwrite=overwrite, progress=byte_progress)
        found = describe_tokenizer_plan(decided)
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
    to: Target = LAYOUTS[0],
    overwrite: Switch = False,
    options: Annotated[ProgramOptions, arg(name="")] = ProgramOptions(),
    push: Annotated[PushOptions, arg(name="")] = PushOptions(),
) -> int:
    """Give a model back to PyTorch: the inverse of convert, through the same tables, bit for bit. Or write a program.

    hf: for transformers' from_pretrained. timm: for timm.create_model("local-dir:DEST"). original: checkpoint.pth for
    unilm's scripts. mmpretrain, mmseg: checkpoint.pth and config.py for Open-MMLab 1.x (these three need torch to
    write). peft: the adapter alone, of a model that was trained with --adapter.rank.
    stablehlo: a program for beit_jax.load_program, on CPUs, NVIDIA GPUs and TPUs, which needs jax and no Flax. onnx:
    model.onnx, which onnxruntime has run. Both are compared with the model before they are called written.

    Try:
      beit-jax export ./native ./for-transformers
      beit-jax export ./native ./for-timm --to timm
      beit-jax export ./native ./served --to stablehlo
      beit-jax export ./native ./for-transformers --push your-name/beit-birds --license apache-2.0

    Args:
        to: The layout, or the kind of program.
        overwrite: Replace DEST if it is an earlier export. The old one stays until the new one is complete.
    """
    from beit_jax.convert import exporter
    from beit_jax.hub import WEIGHTS
    from beit_jax.publishing import push as publishing
    from beit_jax.weights.native import is_native, load, read_config

    if not is_native(native):
        way = "give its directory" if native.name == WEIGHTS else "convert it first"
        raise BeitJaxError(f"{printable(native)}: not a native checkpoint (no {WEIGHTS} in it); {way}")
    refuse_unused(options, to)
    push.check()
    config = read_config(native)
    if to == "stablehlo":
        from beit_jax.programs import stablehlo

        stablehlo.check_export(dest, config, options, overwrite=overwrite, source=native)
    elif to == "onnx":
        from beit_jax.programs import onnx_model

        onnx_model.check_export(dest, config, overwrite=overwrite, source=native)
    else:
        exporter.check_export(dest, to, config, overwrite=overwrite, source=native)
    upload = publishing.prepare(push)
    checkpoint = load(native)
    if to == "stablehlo":
        notes = stablehlo.export_program(checkpoint, dest, options, overwrite=overwrite, source=native)
    elif to == "onnx":
        notes = onnx_model.export_onnx(checkpoint, dest, options, overwrite=overwrite, source=native)
    else:
        notes = exporter.export(checkpoint, dest, to, overwrite=overwrite, source=native)
    print_lines([f"{dest}: written for {to}", *(f"note: {note}" for note in notes)])
    if upload is not None:
        from beit_jax.publishing import card

        subject = card.Subject(
            upload.repository, str(push.license), to, config, checkpoint.provenance, card.start_of(native), notes
        )
        kept = not card.write_card(dest, subject)
        print_lines(publishing.listing(upload, dest, own_card=kept))
        print_lines([f"uploaded     {upload.send(dest, f'Written by beit-jax export --to {to}')}"])
    return 0


def parity(
    source: Positional[SourceName],
    *,
    image: Annotated[tuple[Path, ...], arg(metavar="IMAGE...", help_behavior_hint="")] = (),
    batch: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None,
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
        batch: Number of images of noise, by default 2.
        seed: Seed of the noise and of the masked patches.
    """
    from beit_jax.convert import parity as comparison
    from beit_jax.weights.native import is_native

    require_counts(batch=batch, most=1024)
    if image and batch is not None:
        raise BeitJaxError("--batch is the number of images of noise, which --image replaces; leave one out")
    if seed < 0:
        raise BeitJaxError(f"--seed {seed}: expected an integer of at least 0")
    where = hub.resolve(source)
    if where.path.is_dir() and is_native(where.path):
        raise BeitJaxError(
            f"{source}: a native checkpoint; give the Hugging Face directory it was converted from, or what "
            "beit-jax export writes"
        )
    found = comparison.compare(where, images=image, seed=seed, batch=2 if batch is None else batch)
    stages, notes = found.stages, list(found.notes)
    if json:
        print_json([stage.as_dict() | ({"notes": notes} if notes else {}) for stage in stages])
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
        verdict = f"first difference at {different[0]}" if different else "all stages agree with PyTorch"
        print_lines([verdict, *(f"note: {note}" for note in notes)])
    return 0 if all(stage.passed for stage in stages) else 1
