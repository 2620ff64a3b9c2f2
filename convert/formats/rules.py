"""Weight mapping as data: a `Rule` names the tensors of a file, one Flax leaf, and an operation that runs both ways.

Import and export are two walks over the same rules. Leaves under ``blocks`` are stacked: the names in their rules hold
``{i}``, the layer, and every layer has its own tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from beit_jax.errors import BeitJaxError

_ROWS, _COLUMNS, _PADDING = 256, 256, 16  # the size of a tile: 256 KiB of float32 fit well into a second-level cache


@dataclass(frozen=True)
class Op:
    """An invertible change of layout.

    Attributes:
        load: takes torch tensors, the index of a first row, and a contiguous array. Fills the array with the rows of
            the Flax array (along its first axis) from that index on, cast to the dtype of the array.
        dump: takes a Flax array and returns its torch tensors, as views where possible.
    """

    load: Callable[[Sequence[np.ndarray], int, np.ndarray], None]
    dump: Callable[[np.ndarray], list[np.ndarray]]

    def torch_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Returns the shapes of the torch tensors that make up a leaf of this shape."""
        # The stand-in for the leaf has strides of zero, and so no memory.
        return [part.shape for part in self.dump(np.broadcast_to(np.zeros((), np.bool_), shape))]


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source.T``, tile by tile through a small padded copy.

    The width of a matrix is often a power of two. The elements of one of its columns then compete for the same few
    lines of the cache, and a transpose straight from the source runs at a third of the speed.
    """
    padded = np.empty((_ROWS, _COLUMNS + _PADDING), source.dtype)
    for row in range(0, source.shape[0], _ROWS):
        for column in range(0, source.shape[1], _COLUMNS):
            part = source[row : row + _ROWS, column : column + _COLUMNS]
            tile = padded[: part.shape[0], : part.shape[1]]
            tile[...] = part
            target[column : column + _COLUMNS, row : row + _ROWS] = tile.T


def _load_keep(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[...] = parts[0].reshape(-1, *rows.shape[1:])[start : start + len(rows)]


def _load_linear(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    flat = rows.reshape(-1, rows.shape[-1])
    first = start * (len(flat) // len(rows))  # a row of a kernel that reads heads is head_dim rows of the matrix
    _transpose(parts[0][:, first : first + len(flat)], flat)


def _load_conv(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[...] = parts[0].transpose(2, 3, 1, 0)[start : start + len(rows)]


def _load_up(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[...] = parts[0].transpose(2, 3, 0, 1)[start : start + len(rows)]


def _load_swapped(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[...] = parts[0].swapaxes(2, 3)[start : start + len(rows)]


def _load_qkv(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    targets = rows.reshape(*rows.shape[:2], -1).swapaxes(0, 1)
    for target, part in zip(targets, parts, strict=True):
        _transpose(part[:, start : start + len(rows)], target)


def _load_fused(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    _transpose(parts[0][:, start : start + len(rows)], rows.reshape(len(rows), -1))


def _load_flax_qkv(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    for target, part in zip(rows.reshape(*rows.shape[:2], -1).swapaxes(0, 1), parts, strict=True):
        target[...] = part[start : start + len(rows)]


def _dump_flax_qkv(leaf: np.ndarray) -> list[np.ndarray]:
    hidden, count = leaf.shape[:2]
    return list(leaf.reshape(hidden, count, -1).swapaxes(0, 1))


def _dump_qkv(leaf: np.ndarray) -> list[np.ndarray]:
    hidden, count = leaf.shape[:2]
    return [part.T for part in leaf.reshape(hidden, count, -1).swapaxes(0, 1)]


def _third(index: int) -> Op:
    """One of three vectors that stand in one tensor; the others are another leaf's, or nobody's."""

    def load(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
        rows[...] = parts[0].reshape(3, -1, *rows.shape[1:])[index, start : start + len(rows)]

    def dump(leaf: np.ndarray) -> list[np.ndarray]:
        whole = np.zeros((3, leaf.size), leaf.dtype)
        whole[index] = leaf.reshape(-1)
        return [whole.reshape(-1)]

    return Op(load, dump)


def _load_zeros(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[...] = 0


def _load_parts(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    for row, part in zip(rows, parts[start : start + len(rows)], strict=True):
        row[...] = part.reshape(row.shape)


def _load_after_class(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[:, 0] = 0
    rows[:, 1:] = parts[0]


def _load_fairseq(parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
    rows[...] = parts[0][2:]


KEEP = Op(_load_keep, lambda leaf: [leaf])
"""The same array."""

FLAT = Op(_load_keep, lambda leaf: [leaf.reshape(-1)])
"""[heads * head_dim] <-> [heads, head_dim]."""

LINEAR = Op(_load_linear, lambda leaf: [leaf.reshape(-1, leaf.shape[-1]).T])
"""torch Linear [out, in] <-> [in, out], or [heads, head_dim, out] for a kernel that reads heads."""

CONV = Op(_load_conv, lambda leaf: [leaf.transpose(3, 2, 0, 1)])
"""torch Conv2d [out, in, height, width] <-> [height, width, in, out]."""

CONV_TRANSPOSE = Op(_load_up, lambda leaf: [leaf.transpose(2, 3, 0, 1)])
"""torch ConvTranspose2d [in, out, height, width] <-> [height, width, in, out]."""

SWAPPED = Op(_load_swapped, lambda leaf: [leaf.swapaxes(2, 3)])
"""TensorFlow's Conv2DTranspose [height, width, out, in] <-> [height, width, in, out]."""

QKV = Op(_load_qkv, _dump_qkv)
"""Three torch Linears [heads * head_dim, in] <-> [in, 3, heads, head_dim]."""

FUSED_QKV = Op(_load_fused, lambda leaf: [leaf.reshape(len(leaf), -1).T])
"""One torch Linear [3 * heads * head_dim, in], queries first <-> [in, 3, heads, head_dim]."""

QKV_FLAT = Op(_load_parts, lambda leaf: [part.reshape(-1) for part in leaf])
"""Three vectors [heads * head_dim] <-> [3, heads, head_dim]."""

NO_CLASS_ROW = Op(_load_after_class, lambda leaf: [leaf[:, 1:]])
"""Positions [1, patches, d] that are added before the class token is there <-> [1, 1 + patches, d], zeros first."""

FAIRSEQ_POSITIONS = Op(_load_fairseq, lambda leaf: [np.concatenate([np.zeros_like(leaf[0, :2]), leaf[0]])])
"""[2 + 1 + patches, d], of which fairseq's count of positions leaves two unused <-> [1, 1 + patches, d]."""

FLAX_QKV = Op(_load_flax_qkv, _dump_flax_qkv)
"""Three Flax kernels [in, heads * head_dim] <-> [in, 3, heads, head_dim]."""

FLAX_HEADS = Op(_load_keep, lambda leaf: [leaf.reshape(-1, leaf.shape[-1])])
"""Flax kernel [heads * head_dim, out] <-> [heads, head_dim, out]."""

QUERIES_OF_THREE, VALUES_OF_THREE = _third(0), _third(2)
"""One bias [3 * heads * head_dim], queries first, as far as BEiT has one: -> [heads, head_dim] each. Read only."""

ABSENT = Op(_load_zeros, lambda leaf: [])
"""No tensor <-> zeros: a bias that the other library's models do not have."""

FLAX_ONE_QKV = Op(_load_keep, lambda leaf: [leaf.reshape(len(leaf), -1)])
"""One kernel [in, 3 * heads * head_dim], queries first <-> [in, 3, heads, head_dim]."""


@dataclass(frozen=True)
class Rule:
    """The tensors `torch` make up the leaf at the path `flax`, by the operation `op`.

    Attributes:
        torch: names of tensors in a file, with ``{i}`` for the layer where the leaf is stacked.
        flax: the path of the leaf, such as ``blocks/mlp/fc1/kernel``.
    """

    torch: tuple[str, ...]
    flax: str
    op: Op = KEEP

    @property
    def stacked(self) -> bool:
        return any("{i}" in name for name in self.torch)


Rules = tuple[Rule, ...]


def rule(torch: str | tuple[str, ...], flax: str, op: Op = KEEP) -> Rule:
    """Returns the rule of a leaf: `torch` is the name of its tensor, or the names of its tensors."""
    return Rule((torch,) if isinstance(torch, str) else torch, flax, op)


def affine(torch: str, flax: str) -> Rules:
    """Returns the rules of a LayerNorm: ``weight`` is the scale."""
    return rule(f"{torch}.weight", f"{flax}/scale"), rule(f"{torch}.bias", f"{flax}/bias")


def linear(torch: str, flax: str, op: Op = LINEAR) -> Rules:
    """Returns the rules of a layer with ``weight`` and ``bias``, for the kernel a torch Linear's operation."""
    return rule(f"{torch}.weight", f"{flax}/kernel", op), rule(f"{torch}.bias", f"{flax}/bias")


def batch_norm(torch: str, flax: str) -> Rules:
    """Returns the rules of a BatchNorm2d: scale, bias and the running statistics."""
    running = rule(f"{torch}.running_mean", f"{flax}/mean"), rule(f"{torch}.running_var", f"{flax}/var")
    return (*affine(torch, flax), *running)


def renamed(rules: Sequence[Rule], renames: Sequence[tuple[str, str]]) -> Rules:
    """Returns the rules with their torch names changed: the first (old, new) whose `old` begins a name replaces it."""

    def rename(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)

    return tuple(replace(each, torch=tuple(map(rename, each.torch))) for each in rules)


@dataclass(frozen=True)
class Step:
    """One leaf, and the tensors that fill it.

    Attributes:
        layers: for each layer of the leaf the names of its tensors. A leaf that is not stacked counts as one layer.
    """

    rule: Rule
    shape: tuple[int, ...]
    layers: tuple[tuple[str, ...], ...]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.rule.stacked else self.shape

    def torch_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields every torch tensor of the leaf with the shape it must have."""
        shapes = self.rule.op.torch_shapes(self.layer_shape)
        for names in self.layers:
            yield from zip(names, shapes, strict=True)


def steps(rules: Sequence[Rule], leaves: Mapping[str, tuple[int, ...]]) -> dict[str, Step]:
    """Returns the step that fills every leaf of a model.

    Args:
        leaves: path and shape of every leaf.

    Raises:
        BeitJaxError: no rule, or more than one, fills a leaf. The table of rules is wrong then.
    """
    result = {}
    for path, shape in leaves.items():
        matching = [each for each in rules if each.flax == path]
        if len(matching) != 1:
            raise BeitJaxError(
                f"{path}: expected one rule in the table, found {len(matching)}; correct the format's page in "
                "convert/formats"
            )
        found = matching[0]
        count = shape[0] if found.stacked else 1
        layers = tuple(tuple(name.replace("{i}", str(i)) for name in found.torch) for i in range(count))
        result[path] = Step(found, shape, layers)
    return result


def export(rules: Sequence[Rule], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns flat Flax parameters as torch tensors by name: the inverse of the import.

    The tensors are contiguous, because `safetensors.numpy.save_file` writes other arrays wrongly.

    Raises:
        BeitJaxError: as `steps`, or two leaves have one name in the table, and one would be lost.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, step in steps(rules, {path: leaf.shape for path, leaf in params.items()}).items():
        for i, names in enumerate(step.layers):
            leaf = params[path][i] if step.rule.stacked else params[path]
            twice = [name for name in names if name in tensors]
            if twice:
                raise BeitJaxError(f"{path}: its name {twice[0]} is that of another parameter in this layout")
            tensors |= {
                name: np.ascontiguousarray(part) for name, part in zip(names, step.rule.op.dump(leaf), strict=True)
            }
    return tensors
