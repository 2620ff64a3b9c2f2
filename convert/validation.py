"""Compares the tensors of a file with the model that its configuration describes; one error names all differences."""

import re
from collections.abc import Collection, Mapping, Sequence

import ml_dtypes
import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable

from .files.adapters import MERGE, are_adapted
from .files.weight_file import TensorInfo
from .formats.rules import Step
from .strangers.tensor_names import quantised

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16))

_SHOWN = 10  # tensors named for each kind of problem

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(
    planned: Mapping[str, Step],
    found: Mapping[str, TensorInfo],
    left_out: Collection[str],
    config: BeitConfig,
    what: str,
    origin: str,
) -> None:
    """Compares names, shapes and dtypes; no tensor is read.

    Args:
        planned: for every leaf of the model the tensors that fill it.
        found: the tensors of the file.
        left_out: names in the file that are not this model's.
        what: begins the message.
        origin: what described the model: a file, an option, or "" for the tensors themselves.

    Raises:
        BeitJaxError: tensors are missing, unexpected, of another shape or not floating point. The message names them,
            the likely cause, and what to do.
    """
    expected = {name: shape for step in planned.values() for name, shape in step.torch_shapes()}
    common = [name for name in expected if name in found]
    wrong_shape = [name for name in common if found[name].shape != expected[name]]
    wrong_dtype = [name for name in common if found[name].dtype not in FLOATS]
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in left_out]
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
    if not problems:
        return
    advice = _other_files(unexpected, wrong_dtype)
    if advice is None and origin:
        correct = f"correct {origin}" if not origin.startswith("--") else f"name another one, or leave {origin} out"
        advice = f"{_cause(planned, expected, found, config)}{correct}, or use the weights it belongs to"
    if advice is None:
        advice = (
            "Save the model again with the code that made it, or put its config.json beside it if it is of another kind"
        )
    raise BeitJaxError(f"{what}: {'. '.join(problems)}. {advice[:1].upper()}{advice[1:]}")


def _other_files(unexpected: Collection[str], wrong_dtype: Collection[str]) -> str | None:
    """What to do with weights that another library has changed: no configuration can describe them."""
    if are_adapted(unexpected):
        return f"it holds an adapter that is not merged into its weights: {MERGE}"
    if (found := quantised(unexpected)) is not None:
        return str(found)
    if wrong_dtype:
        return (
            "its weights are quantised: load it with the library that quantised it, and save it in the numbers that "
            "model.dequantize() gives, or convert the checkpoint from before"
        )
    return None


def _shapes(name: str, expected: Shapes, found: Mapping[str, TensorInfo]) -> str:
    return f"{printable(name)} expected {list(expected[name])} found {list(found[name].shape)}"


def _listed(shown: Sequence[str], count: int) -> str:
    return "; ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _cause(planned: Mapping[str, Step], expected: Shapes, found: Mapping[str, TensorInfo], config: BeitConfig) -> str:
    """The likely cause, by the first leaf whose tensor has another shape; "" if there is no such leaf."""
    layers = _layers(planned.values(), found)
    if layers != config.num_hidden_layers:
        return f"The file has {layers} layers, num_hidden_layers says {config.num_hidden_layers}: "
    for leaf, step in planned.items():
        name = next(iter(step.layers[0]), "")  # a bias that a library does not have has no tensor
        if name not in found or len(found[name].shape) != len(expected[name]) or found[name].shape == expected[name]:
            continue
        have, want = found[name].shape, expected[name]
        if leaf.endswith("bias_table"):
            return _table_cause(have, want, config)
        if leaf.endswith("classifier/kernel") and have[1:] == want[1:]:
            return f"The file has {have[0]} classes, id2label has {want[0]}: "
        if leaf.endswith("position_embeddings"):
            return f"The file has {have[1] - 1} positions, image_size and patch_size say {want[1] - 1}: "
    return ""


def _layers(planned: Collection[Step], found: Mapping[str, TensorInfo]) -> int:
    """The number of layers by the names in the file."""
    blocks = [step.rule for step in planned if step.rule.stacked and not step.rule.flax.startswith("aggregation/")]
    stacked = {name for rule in blocks for name in rule.torch}
    patterns = [re.compile(re.escape(name).replace(r"\{i\}", r"(\d{1,6})")) for name in stacked]
    matches = [match for pattern in patterns for match in map(pattern.fullmatch, found) if match]
    return 1 + max((int(match[1]) for match in matches), default=-1)


def _table_cause(have: tuple[int, ...], want: tuple[int, ...], config: BeitConfig) -> str:
    if have[1] != want[1]:
        return f"The file has {have[1]} attention heads, num_attention_heads says {want[1]}: "
    side = ((max(have[0] - 3, 0)) ** 0.5 + 1) / 2
    grid = f"a {side:.0f} x {side:.0f} grid" if side.is_integer() else f"{have[0]} offsets"
    return f"The table is of {grid}, image_size and patch_size say {config.grid}: "
