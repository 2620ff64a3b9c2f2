"""PyTorch tokenizers to Flax and back: DALL-E's two networks, and BEiT v2's VQ-KD.

To add a naming, write its rules below and add a `TokenizerNaming` to `NAMINGS`; recognition, checks, import and export
follow from it. The shapes of the tensors say which model a file holds, because these files have no configuration.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beit_jax.atomic import check_destination, new_directory
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import WEIGHTS, Source, as_source
from beit_jax.terminal import Progress, no_progress
from beit_jax.tokenizers.configs import DvaeDecoderConfig, DvaeEncoderConfig, TokenizerConfig, VqkdConfig
from beit_jax.weights.native import NATIVE
from beit_jax.weights.tensors import LeafSpec

from .files.checkpoint import Checkpoint, TensorInfo, holds_weights, open_checkpoint
from .formats.heads import Statement, stated_by_user, stated_in_training
from .formats.rules import CONV, LINEAR, Rule, Step, export, steps
from .formats.unilm import BACKBONE
from .options import DEFAULT, Options
from .provenance import digests as find_digests
from .provenance import provenance
from .reading import LeafReader
from .training_folders import located
from .validation import FLOATS

if TYPE_CHECKING:
    from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint

_GRID = 14  # tokens along each side of BEiT's 224 pixels
_HEAD_DIM = 64  # channels of an attention head in every published tokenizer
_SHOWN = 10  # tensors named in a message

Shapes = Mapping[str, tuple[int, ...]]


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that every file of the kind has."""
    found = shapes.get(name)
    if found is None or len(found) != rank:
        raise BeitJaxError(f"expected a tensor {name} of {rank} dimensions, found {list(found) if found else 'none'}")
    return found


def _count(shapes: Shapes, name: str, start: int) -> int:
    """The number of tensors called `name`, where ``{}`` counts from `start` without a gap."""
    return next(i for i in itertools.count() if name.format(start + i) not in shapes)


# --- DALL-E -----------------------------------------------------------------------------------------------------------


def _dvae_rules(config: DvaeEncoderConfig | DvaeDecoderConfig) -> list[Rule]:
    """Names as in ``dall_e.Encoder().state_dict()``, whose convolutions call their tensors w and b."""
    names = {"blocks.input": "input", "blocks.output.conv": "output"}
    groups, blocks = range(1, config.group_count + 1), range(1, config.n_blk_per_group + 1)
    for group, block in itertools.product(groups, blocks):
        theirs, ours = f"blocks.group_{group}.block_{block}", f"group_{group}/block_{block}"
        names |= {f"{theirs}.res_path.conv_{i}": f"{ours}/conv_{i}" for i in (1, 2, 3, 4)}
        names[f"{theirs}.id_path"] = f"{ours}/shortcut"
    return [
        rule
        for theirs, ours in names.items()
        for rule in (Rule((f"{theirs}.w",), f"{ours}/kernel", CONV), Rule((f"{theirs}.b",), f"{ours}/bias"))
    ]


def _dvae_config(shapes: Shapes, num_heads: int | None = None) -> DvaeEncoderConfig | DvaeDecoderConfig:
    first_out, first_in, size, _ = _shape(shapes, "blocks.input.w", 4)
    last_out, last_in, _, _ = _shape(shapes, "blocks.output.conv.w", 4)
    groups = _count(shapes, "blocks.group_{}.block_1.res_path.conv_1.w", 1)
    blocks = _count(shapes, "blocks.group_1.block_{}.res_path.conv_1.w", 1)
    if size == 1:  # the encoder begins with 7 x 7 pixels, the decoder with single tokens
        return DvaeDecoderConfig(
            n_init=first_out, n_hid=last_in, vocab_size=first_in, group_count=groups, n_blk_per_group=blocks,
            output_channels=last_out // 2,
        )  # fmt: skip
    config = DvaeEncoderConfig(
        n_hid=first_out, vocab_size=last_out, group_count=groups, n_blk_per_group=blocks, input_channels=first_in,
    )  # fmt: skip
    return replace(config, image_size=(_GRID * config.stride, _GRID * config.stride))


# transformers' FlavaImageCodebook is the same encoder under other names.


def _flava_rules(config: DvaeEncoderConfig) -> list[Rule]:
    return [replace(rule, torch=tuple(map(_to_flava, rule.torch))) for rule in _dvae_rules(config)]


def _flava_config(shapes: Shapes, num_heads: int | None = None) -> DvaeEncoderConfig:
    config = _dvae_config({_from_flava(name): shape for name, shape in shapes.items()})
    if isinstance(config, DvaeDecoderConfig):
        raise BeitJaxError("expected the encoder: its first convolution has 7 x 7 pixels")
    return config


def _to_flava(name: str) -> str:
    name = re.sub(r"(group_\d+)\.", r"\1.group.", name).replace("res_path.", "res_path.path.")
    return name.removesuffix(".w") + ".weight" if name.endswith(".w") else name.removesuffix(".b") + ".bias"


def _from_flava(name: str) -> str:
    name = name.replace(".group.", ".").replace("res_path.path.", "res_path.")
    return name.removesuffix("eight") if name.endswith(".weight") else name.removesuffix("ias")


# --- BEiT v2's VQ-KD --------------------------------------------------------------------------------------------------

_VQKD_RULES = (
    *(
        replace(rule, torch=tuple(f"{part}.{name}" for name in rule.torch), flax=f"{part}/{rule.flax}")
        for part in ("encoder", "decoder")
        for rule in BACKBONE
    ),
    *(
        rule
        for part in ("encode_task", "decode_task")
        for theirs, ours in ((f"{part}_layer.0", f"{part}/fc1"), (f"{part}_layer.2", f"{part}/fc2"))
        for rule in (Rule((f"{theirs}.weight",), f"{ours}/kernel", LINEAR), Rule((f"{theirs}.bias",), f"{ours}/bias"))
    ),
    Rule(("quantize.embedding.weight",), "codebook/embedding"),
    Rule(("quantize.cluster_size",), "codebook/usage"),
    Rule(("quantize.embedding.cluster_size",), "codebook/cluster_size"),
    Rule(("quantize.embedding.embed_avg",), "codebook/embedding_average"),
    Rule(("quantize.embedding.initted",), "codebook/initialised"),
)


def _vqkd_rules(config: VqkdConfig) -> list[Rule]:
    """Names as in unilm's ``VQKD``: two of its transformers, two heads and the codebook."""
    return list(_VQKD_RULES)


def _vqkd_config(shapes: Shapes, num_heads: int | None = None) -> VqkdConfig:
    _, _, *patch = _shape(shapes, "encoder.patch_embed.proj.weight", 4)
    side = math.isqrt(max(_shape(shapes, "encoder.pos_embed", 3)[1] - 1, 0))  # another count does not fit later on
    vocab_size, codebook_dim = _shape(shapes, "quantize.embedding.weight", 2)
    decoder = {f"decoder_{name}": value for name, value in _transformer(shapes, "decoder", num_heads).items()}
    return VqkdConfig(
        image_size=(side * patch[0], side * patch[1]),
        patch_size=(patch[0], patch[1]),
        vocab_size=vocab_size,
        codebook_dim=codebook_dim,
        target_size=_shape(shapes, "decode_task_layer.2.weight", 2)[0],
        **_transformer(shapes, "encoder", num_heads),
        **decoder,
    )


def _transformer(shapes: Shapes, part: str, num_heads: int | None) -> dict[str, int]:
    intermediate_size, hidden_size = _shape(shapes, f"{part}.blocks.0.mlp.fc1.weight", 2)
    if num_heads is None and hidden_size % _HEAD_DIM:
        raise BeitJaxError(
            f"{part}: nothing shows the number of attention heads for {hidden_size} channels; pass --num-heads"
        )
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(shapes, f"{part}.blocks.{{}}.norm1.weight", 0),
        "num_attention_heads": num_heads or hidden_size // _HEAD_DIM,
        "intermediate_size": intermediate_size,
    }


# --- All --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerNaming:
    """The names that one source gives to the tensors of a tokenizer.

    Attributes:
        name: for people, and for the record in a converted tokenizer.
        kinds: the classes of configurations that this naming has.
        marker: a tensor that every file of this naming has, and no file of another.
        config: returns the model that the shapes of its tensors tell, with the number of attention heads that the user
            states, or None.
        rules: returns the rules for a configuration.
        derived: matches the names of tensors that are no part of the tokenizer. They are left out.
    """

    name: str
    kinds: tuple[type[TokenizerConfig], ...]
    marker: str
    config: Callable[[Shapes, int | None], TokenizerConfig]
    rules: Callable[[Any], list[Rule]]
    derived: re.Pattern[str] = re.compile(r"(?!)")


DALL_E = TokenizerNaming("dall_e", (DvaeEncoderConfig, DvaeDecoderConfig), "blocks.input.w", _dvae_config, _dvae_rules)
FLAVA = TokenizerNaming(
    "transformers FlavaImageCodebook", (DvaeEncoderConfig,), "blocks.input.weight", _flava_config, _flava_rules
)
VQKD = TokenizerNaming(
    "unilm VQ-KD",
    (VqkdConfig,),
    "quantize.embedding.weight",
    _vqkd_config,
    _vqkd_rules,
    re.compile(r"(loss|teacher|scaling)"),  # the training's teacher and its input scaling
)
NAMINGS = (DALL_E, FLAVA, VQKD)


@dataclass(frozen=True)
class TokenizerPlan:
    """The plan of an import, made before any tensor is read.

    Attributes:
        steps: for every leaf of the tokenizer, the tensors that fill it.
        notes: lines for the user.
        digests: SHA-256 of every weight file, if it was asked for or is known.
    """

    source: Source
    config: TokenizerConfig
    checkpoint: Checkpoint
    naming: TokenizerNaming
    steps: Mapping[str, Step]
    notes: tuple[str, ...]
    options: Options
    digests: Mapping[str, str | None]

    @property
    def reader(self) -> LeafReader:
        """Reads the leaves, in float32."""
        specs = {path: LeafSpec(step.shape, np.dtype(np.float32)) for path, step in self.steps.items()}
        return LeafReader(self.checkpoint, self.steps, specs, allow_nonfinite=self.options.allow_nonfinite)

    @property
    def parameters(self) -> int:
        return sum(math.prod(step.shape) for step in self.steps.values())

    def provenance(self) -> dict[str, Any]:
        """Returns the origin of the weights, as the native tokenizer records it."""
        return provenance(self.source, self.checkpoint, self.naming.name, self.digests, self.options.asked())


def is_tokenizer(source: Source | str | Path, options: Options = DEFAULT) -> bool:
    """Returns True if the tensors of a checkpoint are named as a tokenizer's.

    Raises:
        BeitJaxError: the file cannot be read.
    """
    if options.base is not None:  # the source is an adapter, and those of tokenizers are unknown
        return False
    where, _ = located(as_source(source), options, holds_weights)
    with open_checkpoint(where.path, prefer=options.weights, format=options.format) as checkpoint:
        return any(naming.marker in checkpoint.tensors for naming in NAMINGS)


def plan(source: Source | str | Path, options: Options = DEFAULT) -> TokenizerPlan:
    """Reads names and shapes of a tokenizer, or of DALL-E's decoder, and checks that they belong together.

    Args:
        source: a state dict in any file that `open_checkpoint` reads, or one of OpenAI's pickled modules, which is read
            without running it.

    Raises:
        BeitJaxError: the file cannot be read; its names are no tokenizer's; tensors are missing, unexpected, of another
            shape or not floating point; an option that a tokenizer has no use for.
    """
    source, _ = located(as_source(source), options, holds_weights)
    checkpoint = open_checkpoint(source.path, prefer=options.weights, format=options.format)
    try:
        return _plan(source, checkpoint, options)
    except BaseException:
        checkpoint.close()
        raise


def _plan(source: Source, checkpoint: Checkpoint, options: Options) -> TokenizerPlan:
    from beit_jax.tokenizers.build import tokenizer_shapes  # builds the network, with JAX

    naming = _recognise(checkpoint)
    _check_options(naming, options)
    digests = find_digests(checkpoint, options)
    stated = stated_by_user(options.num_heads) or stated_in_training(checkpoint.metadata)
    config = _config(naming, checkpoint, _agreed(stated, checkpoint))
    planned = steps(naming.rules(config), tokenizer_shapes(config))
    dropped = {name for name in checkpoint.tensors if naming.derived.match(name)}
    _check_tensors(checkpoint, planned, dropped)
    notes = (*checkpoint.notes, *_told(config, stated))
    return TokenizerPlan(source, config, checkpoint, naming, planned, notes, options, digests)


def _agreed(stated: Sequence[Statement], checkpoint: Checkpoint) -> int | None:
    """The number of attention heads that all statements say; None where there is none."""
    for other in stated[1:]:
        if other.heads != stated[0].heads:
            raise BeitJaxError(
                f"{printable(checkpoint.path, 1024)}: {stated[0].heads} attention heads by {stated[0].where}, "
                f"{other.heads} by {other.where}: pass --num-heads"
            )
    return stated[0].heads if stated else None


def _told(config: TokenizerConfig, stated: Sequence[Statement]) -> list[str]:
    """Says where the number of heads is from, which no tensor shows."""
    if not isinstance(config, VqkdConfig):
        return []
    if stated:
        return [f"{config.num_attention_heads} attention heads: {stated[0].where}"]
    return [
        f"{config.num_attention_heads} attention heads of {_HEAD_DIM} channels, as in the published tokenizers: no "
        "tensor shows it; --num-heads says otherwise"
    ]


def load(source: Source | str | Path, options: Options = DEFAULT) -> "TokenizerCheckpoint":
    """Converts a tokenizer, or DALL-E's decoder, in memory, in float32.

    Raises:
        BeitJaxError: as `plan`; NaN or infinite weights.
    """
    from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint

    decided = plan(source, options)
    with decided.checkpoint:
        return TokenizerCheckpoint(decided.config, decided.reader.params(), decided.provenance())


def convert(
    source: Source | str | Path,
    destination: str | Path,
    options: Options = DEFAULT,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> TokenizerPlan:
    """Converts a tokenizer into a native one at `destination`, as `beit_jax.convert.convert` does with a model.

    Args:
        overwrite, progress: as there.

    Raises:
        BeitJaxError: as `load`; a destination that cannot be written, or that is no native checkpoint or holds the
            source. Nothing is left behind.
    """
    from beit_jax.tokenizers.checkpoint import save_config

    source, destination = as_source(source), Path(destination)
    check_destination(destination, overwrite=overwrite, contents=NATIVE, source=source.path)
    decided = plan(source, options)
    need_bytes = 4 * decided.parameters
    with (
        decided.checkpoint,
        new_directory(
            destination, overwrite=overwrite, contents=NATIVE, source=source.path, need_bytes=need_bytes
        ) as directory,
        progress(2 * need_bytes) as advance,
    ):
        save_config(directory, decided.config)
        decided.reader.write(directory / WEIGHTS, decided.provenance(), advance)
    return decided


_USED = ("weights", "format", "allow_nonfinite", "expect_sha256", "sha256")


def _check_options(naming: TokenizerNaming, options: Options) -> None:
    """Refuses options that only a model has a use for.

    Raises:
        BeitJaxError: names the options.
    """
    used = (*_USED, "num_heads") if VqkdConfig in naming.kinds else _USED
    unused = [f"--{name.replace('_', '-')}" for name in options.asked() if name not in used]
    if unused:
        raise BeitJaxError(f"{', '.join(unused)}: the file is a {naming.name} tokenizer, which has no use for it")


def to_torch(
    config: TokenizerConfig, params: Mapping[str, np.ndarray], naming: TokenizerNaming | None = None
) -> dict[str, np.ndarray]:
    """Returns the flat parameters of a tokenizer as contiguous torch tensors by name.

    The float32 tensors of a converted checkpoint come back bit for bit.

    Args:
        naming: by default the first of `NAMINGS` that has such models.

    Raises:
        BeitJaxError: `naming` has no such model.
    """
    chosen = naming or next(naming for naming in NAMINGS if type(config) in naming.kinds)
    if type(config) not in chosen.kinds:
        raise BeitJaxError(f"{chosen.name} has no {config.model_type}; leave the naming out")
    return export(chosen.rules(config), params)


def _recognise(checkpoint: Checkpoint) -> TokenizerNaming:
    for naming in NAMINGS:
        if naming.marker in checkpoint.tensors:
            return naming
    shown = ", ".join(printable(name, 60) for name in list(checkpoint.tensors)[:3])
    known = ", ".join(naming.name for naming in NAMINGS)
    raise BeitJaxError(
        f"{printable(checkpoint.path, 1024)}: no tokenizer's names found (known: {known}); "
        f"the file holds {len(checkpoint.tensors)} tensors: {shown}, ..."
    )


def _config(naming: TokenizerNaming, checkpoint: Checkpoint, num_heads: int | None) -> TokenizerConfig:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if not naming.derived.match(name)}
    try:
        return naming.config(shapes, num_heads)
    except BeitJaxError as error:
        raise BeitJaxError(f"{printable(checkpoint.path, 1024)}: not a {naming.name} tokenizer: {error}") from None


def _check_tensors(checkpoint: Checkpoint, planned: Mapping[str, Step], dropped: set[str]) -> None:
    """Compares names, shapes and dtypes; no tensor is read."""
    expected = {name: shape for step in planned.values() for name, shape in step.torch_shapes()}
    found = checkpoint.tensors
    problems = [
        f"{printable(name)} expected {_described(expected.get(name))} found {_described(found.get(name))}"
        for name in sorted(expected.keys() | (found.keys() - dropped))
        if name not in found or found[name].shape != expected.get(name) or found[name].dtype not in FLOATS
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BeitJaxError(
            f"{printable(checkpoint.path, 1024)}: {len(problems)} tensors do not fit the rest: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Use the published file, or one saved by the same code"
        )


def _described(tensor: TensorInfo | tuple[int, ...] | None) -> str:
    match tensor:
        case None:
            return "nothing"
        case TensorInfo(shape=shape, dtype=dtype):
            return f"{list(shape)} of {dtype}"
        case shape:
            return f"{list(shape)}"
