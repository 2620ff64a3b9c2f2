"""Do a file's tensors fit the model its configuration describes? One error for everything that does not."""

import re
from collections.abc import Collection, Mapping, Sequence

import ml_dtypes
import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable

from .files.checkpoint import TensorInfo

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16))

_SHOWN = 10  # tensors named for each kind of problem
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks)\.(\d+)\.")

Shapes = Mapping[str, tuple[int, ...]]


def check_fit(
    expected: Shapes, found: Mapping[str, TensorInfo], derived: Collection[str], config: BeitConfig, what: str
) -> None:
    """Compares names, shapes and dtypes; no tensor is read.

    Args:
        expected: every tensor that the model needs, with its shape.
        derived: names in the file that may be left out.
        what: begins the message.

    Raises:
        BeitJaxError: tensors are missing, unexpected, of another shape or not floating point; says which and the
            likely cause.
    """
    common = [name for name in expected if name in found]
    wrong_shape = [name for name in common if found[name].shape != expected[name]]
    wrong_dtype = [name for name in common if found[name].dtype not in FLOATS]
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in derived]
    kinds = (
        ("missing", missing, printable),
        ("unexpected", unexpected, printable),
        ("of another shape", wrong_shape, lambda name: _shapes(name, expected, found)),
        ("not floating point", wrong_dtype, lambda name: f"{printable(name)} is {found[name].dtype}"),
    )
    problems = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} {kind}: {_listed(list(map(show, names[:_SHOWN])), len(names))}"
        for kind, names, show in kinds
        if names
    ]
    if problems:
        raise BeitJaxError(f"{what}: {'. '.join(problems)}. {_advice(wrong_shape, expected, found, config)}")


def _shapes(name: str, expected: Shapes, found: Mapping[str, TensorInfo]) -> str:
    return f"{printable(name)} expected {list(expected[name])} found {list(found[name].shape)}"


def _listed(shown: Sequence[str], count: int) -> str:
    return "; ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _advice(wrong_shape: Sequence[str], expected: Shapes, found: Mapping[str, TensorInfo], config: BeitConfig) -> str:
    """The likely cause, from which tensors do not fit."""
    layers = 1 + max((int(match[1]) for match in map(_LAYER.search, found) if match), default=-1)
    if layers != config.num_hidden_layers:
        return f"The file has {layers} layers, num_hidden_layers says {config.num_hidden_layers}: correct config.json"
    for name in wrong_shape:
        have, want = found[name].shape, expected[name]
        if len(have) != len(want):
            continue
        if name.endswith("relative_position_bias_table"):
            return _table_advice(have, want, config)
        if name.endswith(("classifier.weight", "conv_seg.weight")) and have[1:] == want[1:]:
            return f"The file has {have[0]} classes, id2label has {want[0]}: correct config.json"
        if name.endswith("position_embeddings"):
            positions = f"The file has {have[1] - 1} positions, image_size and patch_size say {want[1] - 1}"
            return f"{positions}: correct config.json"
    return "Correct config.json, or use the weights it belongs to"


def _table_advice(have: tuple[int, ...], want: tuple[int, ...], config: BeitConfig) -> str:
    if have[1] != want[1]:
        return f"The file has {have[1]} attention heads, num_attention_heads says {want[1]}: correct config.json"
    side = ((max(have[0] - 3, 0)) ** 0.5 + 1) / 2
    grid = f"a {side:.0f} x {side:.0f} grid" if side.is_integer() else f"{have[0]} offsets"
    return f"The table is of {grid}, image_size and patch_size say {config.grid}: correct config.json"
