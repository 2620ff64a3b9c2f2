"""An adapter merged into the model it was trained on: leaves of the base, changed in float32 and rounded once.

PEFT's names are those of whatever program the model was adapted in. Every format's table of names is asked, so that an
adapter made with transformers 5 fits a file with the names of transformers 4, of timm or of unilm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter

import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.adapt import Adaptation, Leaves, adaptations
from beit_jax.models.heads import HeadChange, Labels, change_head
from beit_jax.weights.leaves import shapes as param_shapes

from ..formats.format import SourceFormat
from ..formats.rules import KEEP, Step, steps
from .read import LowRank, PeftAdapter

Made = Mapping[str, tuple[tuple[str, ...], Adaptation]]
_CLASSES = ("classifier.bias", "head.bias")  # as every format ends the names of what has a row for a class
_WRAPPED = ("timm_model.", "model.", "module.")


@dataclass
class _Changes:
    """What an adapter changes of one leaf: by layer (0 where it is not stacked) and place among the rule's tensors."""

    step: Step
    factors: dict[tuple[int, int], LowRank] = field(default_factory=dict)
    whole: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    added: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """True if nothing of the base's leaf is left."""
        return len(self.whole) == sum(len(names) for names in self.step.layers)

    def apply(self, leaves: Leaves, before: Adaptation | None = None) -> np.ndarray:
        """The leaf, in the dtype of the base's; `before` makes the base's of other leaves."""
        step, base = self.step, None if before is None else before(leaves)
        result = np.empty(step.shape, np.float32 if base is None else base.dtype)
        for i in range(len(step.layers)):
            old = np.zeros(step.shape, np.float32) if base is None else base
            layer, target = (old[i], result[i]) if step.rule.stacked else (old, result)
            tensors = (np.asarray(part, np.float32) for part in step.rule.op.dump(layer))
            parts = [np.ascontiguousarray(self._changed((i, k), tensor)) for k, tensor in enumerate(tensors)]
            step.rule.op.load(parts, 0, target)
        return result

    def _changed(self, key: tuple[int, int], tensor: np.ndarray) -> np.ndarray:
        tensor = self.whole.get(key, tensor)
        if (low_rank := self.factors.get(key)) is not None:
            tensor = low_rank.merged(tensor)
        return tensor if (addend := self.added.get(key)) is None else tensor + addend


def onto(
    adapter: PeftAdapter,
    base: BeitConfig,
    formats: tuple[SourceFormat, ...],
    labels: Labels | int | None = None,
) -> HeadChange:
    """The base with the adapter merged, as a change of the base's head and of some of its leaves.

    Args:
        base: the model as it lies in the base's file.
        formats: all formats, whose names the adapter may have.
        labels: names or number of the classes as the user says them; None: as the adapter or the base says.

    Raises:
        BeitJaxError: the adapter is not this model's; it names the tensor.
    """
    target, head = _model(adapter, base, labels)
    shapes, before = param_shapes(target), param_shapes(head.config)
    resized = composed(adaptations(head.config, target), head.made)
    kept = {name for name in head.moved if shapes.get(name) == before[name] and name not in resized}
    changes = _changes(adapter, target, formats)
    made: dict[str, tuple[tuple[str, ...], Adaptation]] = {}
    for leaf in shapes:
        change = changes.get(leaf)
        if change is not None and change.complete:
            made[leaf] = (), change.apply
        elif leaf in resized:
            sources, how = resized[leaf]
            made[leaf] = sources, how if change is None else partial(change.apply, before=how)
        elif leaf not in kept:
            raise BeitJaxError(
                f"{printable(adapter.path)}: {printable(leaf)} of the adapted model is neither in it nor in the base; "
                "name the base that it was trained on, with its head"
            )
        elif change is not None:
            made[leaf] = (leaf,), partial(change.apply, before=itemgetter(leaf))
    count = f"{len(adapter.factors)} modules" + (f", {len(adapter.whole)} tensors of its own" if adapter.whole else "")
    return HeadChange(target, head.moved, made, (f"adapter merged in float32: {count}",), False)


def composed(second: Made, first: Made) -> dict[str, tuple[tuple[str, ...], Adaptation]]:
    """What `second` makes of leaves that `first` makes, as made of what `first` reads."""

    def follow(leaves: Leaves, *, sources: tuple[str, ...], last: Adaptation) -> np.ndarray:
        return last({name: first[name][1](leaves) if name in first else leaves[name] for name in sources})

    result: dict[str, tuple[tuple[str, ...], Adaptation]] = {}
    for name, (sources, last) in second.items():
        read = dict.fromkeys(one for source in sources for one in (first[source][0] if source in first else (source,)))
        result[name] = tuple(read), partial(follow, sources=sources, last=last)
    return result


def _model(adapter: PeftAdapter, base: BeitConfig, asked: Labels | int | None) -> tuple[BeitConfig, HeadChange]:
    """The adapted model, and the base as a model with such leaves as the adapted one has."""
    rows = next((len(leaf) for name, leaf in adapter.whole.items() if name.endswith(_CLASSES)), None)
    labels = None if asked is None else _names(asked)
    if rows is not None and labels is not None and len(labels) != rows:
        raise BeitJaxError(
            f"{printable(adapter.path)}: its classifier has {rows} classes, {len(labels)} were named; name as many"
        )
    if adapter.content is not None:
        stated = BeitConfig.from_hf(adapter.content, file=str(adapter.path))
        head = change_head(base, 1) if base.task == "features" != stated.task else change_head(base)
        return replace(stated, labels=labels or stated.labels), head
    if rows is None or (rows == len(base.labels) and labels is None):
        return base, change_head(base)
    named = labels or tuple(f"LABEL_{i}" for i in range(rows))
    head = change_head(base, rows)
    return replace(head.config, labels=named, problem_type=None), head


def _names(labels: Labels | int) -> tuple[str, ...]:
    if isinstance(labels, int):
        return tuple(f"LABEL_{i}" for i in range(labels))
    names = list(labels)
    if not all(isinstance(name, str) for name in names):
        raise BeitJaxError("--labels: numbers choose classes of a checkpoint; an adapter's are named: give their names")
    return tuple(map(str, names))


def _changes(adapter: PeftAdapter, target: BeitConfig, formats: tuple[SourceFormat, ...]) -> dict[str, _Changes]:
    """What the adapter changes, by leaf."""
    from beit_jax.adapters.low_rank import PROJECTIONS  # which imports JAX; only adapters need it

    table = _table(target, formats)
    changes: dict[str, _Changes] = {}
    keys, idle = PROJECTIONS["k"], set[str]()  # a bias of keys, which no base has, changes no softmax of their scores

    def unwrapped(name: str) -> str:
        while name not in table and (wrapper := next((each for each in _WRAPPED if name.startswith(each)), None)):
            name = name.removeprefix(wrapper)
        return name

    def place(name: str) -> tuple[_Changes, tuple[int, int], tuple[int, ...]]:
        bare = unwrapped(name)
        if bare not in table:
            raise BeitJaxError(
                f"{printable(adapter.path)}: {printable(name)}: no tensor of the base, a {target.model_type} model for "
                f"{target.task}; name the base that it was trained on, and --num-labels if its head is new"
            )
        step, layer, part, shape = table[bare]
        found = changes.setdefault(step.rule.flax, _Changes(step))
        if found.step.rule != step.rule:
            raise BeitJaxError(f"{printable(adapter.path)}: {printable(name)}: names of two formats in one adapter")
        return found, (layer, part), shape

    for module, low_rank in adapter.factors.items():
        found, key, shape = place(f"{module}.weight")
        _check_shapes(adapter, module, low_rank, shape)
        found.factors[key] = low_rank
        if found.step.rule.flax.endswith(keys.kernel) and key[1] == keys.part:
            idle.add(f"{module}.bias")
    for kind, tensors in (("whole", adapter.whole), ("added", adapter.added)):
        for name, leaf in tensors.items():
            if kind == "added" and name in idle and unwrapped(name) not in table:
                continue
            found, key, shape = place(name)
            if leaf.shape != shape:
                raise BeitJaxError(
                    f"{printable(adapter.path)}: {printable(name)}: expected {list(shape)} by the base, found "
                    f"{list(leaf.shape)}; name the base that it was trained on"
                )
            getattr(found, kind)[key] = leaf
    return changes


def _table(target: BeitConfig, formats: tuple[SourceFormat, ...]) -> dict[str, tuple[Step, int, int, tuple[int, ...]]]:
    """Every name that a format of PyTorch has for a tensor of the model: its leaf, layer and place, and its shape.

    Other programs use some of these names for weights that lie [in, out], PaddleClas all of the original's.
    """
    shapes = param_shapes(target)
    table: dict[str, tuple[Step, int, int, tuple[int, ...]]] = {}
    for each in formats:
        for prefix in each.prefixes:
            rules = [rule for rule in each.rules(target, prefix) if rule.flax in shapes]
            if any(rule.flax.endswith("mlp/fc1/kernel") and rule.op == KEEP for rule in rules):
                continue
            for step in steps(rules, {rule.flax: shapes[rule.flax] for rule in rules}).values():
                sizes = step.rule.op.torch_shapes(step.layer_shape)
                for layer, names in enumerate(step.layers):
                    for part, (name, size) in enumerate(zip(names, sizes, strict=True)):
                        table.setdefault(name, (step, layer, part, size))
    return table


def _check_shapes(adapter: PeftAdapter, module: str, found: LowRank, shape: tuple[int, ...]) -> None:
    assert found.a is not None and found.b is not None
    inputs, outputs = found.a.shape[1:], len(found.b)
    if (outputs, *inputs) != shape or (found.magnitude is not None and found.magnitude.size != outputs):
        raise BeitJaxError(
            f"{printable(adapter.path)}: {printable(module)}: expected factors of {list(shape)} by the base, found "
            f"{[outputs, *inputs]}; name the base that it was trained on"
        )
