"""The number of attention heads: what a file, a configuration, a name or the user states of it.

Only a position bias table shows the number. All other tensors have the same shapes for any number of heads, and a wrong
one computes other features without an error. Nothing is therefore assumed: without a statement the file is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit_jax.errors import BeitJaxError, printable


@dataclass(frozen=True)
class Statement:
    """A number of heads, and where it is stated."""

    heads: int
    where: str


@dataclass(frozen=True)
class Size:
    """What the tensors of an encoder tell of its size: channels, blocks, and channels within an MLP."""

    width: int
    depth: int
    intermediate: int


BASE, LARGE = Size(768, 12, 3072), Size(1024, 24, 4096)
GIANT, THIN = Size(1408, 40, 6144), Size(544, 24, 2176)

HUGE = Size(1280, 32, 5120)
TINY, SMALL, MEDIUM = Size(192, 12, 768), Size(384, 12, 1536), Size(512, 12, 2048)

PUBLISHED: Mapping[Size, int] = {BASE: 12, LARGE: 16, HUGE: 16, GIANT: 16, THIN: 16}
"""Heads of the models that were published: BEiT, BEiT v2, DiT, Data2Vec-Vision, EVA-01, BEiT-3, and ViT's and MAE's."""

_NAMED: Mapping[Size, int] = {**PUBLISHED, TINY: 3, SMALL: 6, MEDIUM: 8}
"""The same where an architecture is named. Sizes do not say it: MoCo v3's small ViT has 12 heads, DeiT's has 6."""

# unilm's and timm's names of architectures; what follows the patch size (image size, vocabulary) changes no head.
_ARCHITECTURES: Mapping[re.Pattern[str], Size] = {
    re.compile(r"(beit|beitv2|dit)_base_patch\d+(_\w+)?"): BASE,
    re.compile(r"(beit|beitv2|dit)_large_patch\d+(_\w+)?"): LARGE,
    re.compile(r"beit_24x544_patch\d+(_\w+)?"): THIN,
    re.compile(r"eva_g(iant)?_patch14(_\w+)?"): GIANT,
    re.compile(r"beit3_giant_patch\d+(_\w+)?"): GIANT,
    re.compile(r"(vit|deit3?)_huge_patch\d+(_\w+)?"): HUGE,
    re.compile(r"(vit|deit3?|eva|beit3)_large_patch\d+(_\w+)?|flexivit_large"): LARGE,
    re.compile(r"(vit|deit3?|beit3)_base_(distilled_)?patch\d+(_\w+)?|flexivit_base"): BASE,
    re.compile(r"(vit|deit3)_medium_patch\d+(_\w+)?"): MEDIUM,
    re.compile(r"(vit|deit3?)_small_(distilled_)?patch\d+(_\w+)?|flexivit_small"): SMALL,
    re.compile(r"(vit|deit)_tiny_(distilled_)?patch\d+(_\w+)?"): TINY,
}
_HEADS = ("num_heads", "num_attention_heads")
_NAMES = ("model", "arch", "architecture", "model_name")
_ARGUMENTS = ("model_args", "model_kwargs")
_OTHER_NETWORKS = re.compile(r"decoder|teacher|tokenizer|optim|sched")
_DEPTH = 4  # of settings within settings


def settle(size: Size, certain: Sequence[Statement], hints: Sequence[Statement], file: str) -> Statement:
    """Returns the statement that counts.

    Args:
        certain: a bias table, ``config.json``, the user's option, in the order of their weight. They must agree.
        hints: what lay in a training file. They count where nothing is certain, and must agree then.
        file: the weights, for messages.

    Raises:
        BeitJaxError: statements contradict each other, none is there, or the number does not divide the width.
    """
    found = [*certain] or [*hints]
    if not found and size in PUBLISHED:
        found = [Statement(PUBLISHED[size], f"as the published models of width {size.width} and depth {size.depth}")]
    if not found:
        raise BeitJaxError(
            f"{file}: no tensor shows the number of attention heads, and no config.json, training argument or "
            f"published size (width {size.width}, depth {size.depth}) states it: convert it with --num-heads N, in "
            "Python Options(num_heads=N), or put the model's config.json, timm's or transformers', beside it"
        )
    first = found[0]
    for other in found[1:]:
        if other.heads != first.heads:
            advice = "correct one of them" if certain else "pass --num-heads"
            raise BeitJaxError(
                f"{file}: {first.heads} attention heads by {first.where}, {other.heads} by {other.where}: {advice}"
            )
    if first.heads < 1 or size.width % first.heads:
        raise BeitJaxError(
            f"{file}: {first.where}: expected a number of attention heads that divides the width {size.width}, "
            f"found {first.heads}: correct it"
        )
    return first


def stated_by_user(num_heads: int | None) -> list[Statement]:
    """Returns the option, if it was given."""
    return [] if num_heads is None else [Statement(num_heads, "--num-heads")]


def stated_by_architecture(name: object, arguments: Mapping[str, Any], size: Size, where: str) -> list[Statement]:
    """Returns what an architecture's name and the arguments that change it say of a model of this size.

    A name that is known says the heads of models of its own width and depth only, because it may stand beside the
    weights of another model.
    """
    for key in _HEADS:
        if (stated := arguments.get(key)) is not None:
            if (heads := integer(stated)) is None:
                raise BeitJaxError(f"{where}{key}: expected the number of attention heads, found {printable(stated)}")
            return [Statement(heads, f"{where}{key}")]
    bare = str(name).rpartition("/")[2].partition(".")[0]  # hub names have an owner, timm's names a tag
    known = next((known for pattern, known in _ARCHITECTURES.items() if pattern.fullmatch(bare)), None)
    if known is None:
        return []
    built = arguments.get("embed_dim", known.width), arguments.get("depth", known.depth)
    if built != (size.width, size.depth):
        return []
    return [Statement(_NAMED[known], f"the architecture {printable(bare, 60)}")]


def stated_in_training(metadata: Mapping[str, object], size: Size | None = None) -> list[Statement]:
    """Returns the numbers among the settings that a training loop saved beside the weights.

    Args:
        size: of the encoder; where no number is stated, names of architectures of this size say it.
    """
    explicit: list[Statement] = []
    named: list[Statement] = []
    for path, settings in all_settings(metadata):
        for key in _HEADS:
            if (heads := integer(settings.get(key))) is not None:
                explicit.append(Statement(heads, printable(path + key, 80)))
        arguments = next((value for key in _ARGUMENTS if isinstance(value := settings.get(key), Mapping)), {})
        for key in _NAMES:
            if size is not None and isinstance(settings.get(key), str):
                named += stated_by_architecture(settings[key], arguments, size, f"{path}{key}.")
    return explicit or named


def all_settings(
    value: Mapping[str, object], path: str = "", depth: int = _DEPTH
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the settings of a training loop, and those within them that are of the model, each with its path."""
    yield path, value
    for key, inner in value.items():
        if depth and isinstance(inner, Mapping) and not _OTHER_NETWORKS.search(key):
            yield from all_settings(inner, f"{path}{key}.", depth - 1)


def integer(value: object) -> int | None:
    """Returns a whole number that may count something, else None.

    safetensors' metadata holds it as text, and some configuration files as 12.0.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 31:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        return int(value)
    return value if type(value) is int and abs(value) < 1 << 31 else None
