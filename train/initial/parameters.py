"""Initial parameters: drawn as the original code draws them, or taken from a checkpoint. All are float32."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import constant, normal, ones, truncated_normal, variance_scaling, zeros
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.adapt import Adaptation, adaptations
from beit_jax.models.build import param_shapes
from beit_jax.tree import Nested, first_match, unflatten
from beit_jax.weights.native import NativeCheckpoint

Scheme = Literal["finetune", "pretrain"]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Draw = Callable[[Key[Array, ""], Shape, DTypeLike], Float[Array, "..."]]

CLASSIFIER_SCALE = 0.001
"""Scale of the weights that a classifier starts fine-tuning with: the original's --init_scale."""


# --- Drawn ------------------------------------------------------------------------------------------------------------


def initial_params(config: BeitConfig, scheme: Scheme, key: Key[Array, ""]) -> Nested:
    """All parameters of a model, and its running statistics, float32. Traceable: jit it with ``out_shardings``.

    A leaf depends on `key` and on its own name only: models that share an encoder share its initial values, whatever
    their heads.

    Args:
        scheme: "finetune" as unilm's fine-tuning and segmentation models: normal; the patch projection as torch draws
            convolutions; a classifier near zero. "pretrain" as its masked-image models: normal, cut at one standard
            deviation. Both divide the last matrices of block i's branches by ``sqrt(2 * (i + 1))``, and draw the
            segmentation heads as mmseg does.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py, modeling_pretrain.py and semantic_segmentation/backbone;
    mmseg 0.11 `ConvModule` and `BaseDecodeHead`. mmseg's `BEiT.init_weights` undoes the division by depth, but only
    for encoders that are not loaded from a checkpoint; that is not followed.
    """
    return unflatten(_draw(config, scheme, key, param_shapes(config)))


def _draw(config: BeitConfig, scheme: Scheme, key: Key[Array, ""], names: Iterable[str]) -> dict[str, Array]:
    rules, shapes = _rules(config, scheme), param_shapes(config)
    return {name: first_match(rules, name)(_leaf_key(key, name), shapes[name], jnp.float32) for name in names}


def _leaf_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    return jax.random.fold_in(key, zlib.crc32(name.removeprefix("beit/").encode()))


def _rules(config: BeitConfig, scheme: Scheme) -> list[tuple[str, Draw]]:
    """How each parameter is drawn, by its flat name; the first pattern that matches counts."""
    hidden, std = config.hidden_size, config.initializer_range
    if scheme == "finetune":
        weight: Draw = normal(std)
        patch = (r"(.*/)?patch_(kernel|bias)", _torch_default(_fan_in(config)))
        classifier = (r"classifier/kernel", normal(std * CLASSIFIER_SCALE))
    else:
        weight = truncated_normal(std, lower=-1.0, upper=1.0)
        patch = (r"(.*/)?patch_kernel", weight)
        classifier = (r"classifier/kernel", weight)
    return [
        (r"(.*/)?(scale|var)", ones),
        (r"(.*/)?gamma_[12]", constant(config.layer_scale_init_value)),
        (r"(.*/)?((shared_)?bias_table|mean)", zeros),
        patch,
        # torch counts what a transposed convolution's kernel [in, out, 2, 2] has after its first axis as inputs.
        (r"fpn/(up4_first|up4_second|up2)/(kernel|bias)", _torch_default(4 * hidden)),
        (r"(decode|auxiliary)_head/classifier/kernel", normal(0.01)),
        (r"(decode|auxiliary)_head/\w+/kernel", variance_scaling(2.0, "fan_out", "normal")),
        (r"aggregation/blocks/(attention/out_kernel|mlp/fc2/kernel)", _by_depth(weight, config.aggregate_from)),
        (r"(.*/)?blocks/(attention/out_kernel|mlp/fc2/kernel)", _by_depth(weight)),
        classifier,
        (r"(.*/)?((qkv_)?kernel|cls_token|mask_token|position_embeddings)", weight),
        (r"(.*/)?\w*bias", zeros),
    ]


def _fan_in(config: BeitConfig) -> int:
    return config.patch_size[0] * config.patch_size[1] * config.num_channels


def _torch_default(fan_in: int) -> Draw:
    """torch's draw for the kernel and the bias of a convolution: uniform within 1 / sqrt(fan_in)."""

    def initialise(key: Key[Array, ""], shape: Shape, dtype: DTypeLike) -> Float[Array, "..."]:
        bound = 1.0 / sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


def _by_depth(draw: Draw, first: int = 0) -> Draw:
    """`draw` for stacked layers, the first of which has the number `first`, from 0; layer i is divided by
    sqrt(2 * (i + 1)). The original's fix_init_weight."""

    def initialise(key: Key[Array, ""], shape: Shape, dtype: DTypeLike) -> Float[Array, "..."]:
        scale = np.sqrt(2.0 * np.arange(first + 1, first + shape[0] + 1)).astype(np.float32)
        return draw(key, shape, dtype) / scale.reshape(-1, *(1 for _ in shape[1:]))

    return initialise


# --- From a checkpoint ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The fate of a checkpoint's tensors that were not simply taken over. Encoder names begin with ``beit/``.

    Attributes:
        adapted: parameters made from the checkpoint's by resizing or copying to every layer.
        dropped: the checkpoint's tensors that the model has no use for.
        drawn: parameters that start new.
    """

    adapted: tuple[str, ...]
    dropped: tuple[str, ...]
    drawn: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people: a line for each kind that occurs."""
        kinds = {"adapted": self.adapted, "dropped": self.dropped, "starts new": self.drawn}
        return [f"{kind:<10} {', '.join(map(printable, names))}" for kind, names in kinds.items() if names]


# What may be left out of a checkpoint or start new: heads, and what an encoder has for one use only.
_OPTIONAL = [
    (r"(?!beit/).*", True),
    (r"beit/embeddings/mask_token", True),
    (r"beit/embedding_head/kernel", True),  # of BEiT-3's retrieval: no task that is trained has it
    (r"beit/(norm|pooler_norm)/(scale|bias)", True),
    (r".*", False),
]


@dataclass(frozen=True)
class _Transfer:
    """Where every parameter comes from, before any is made. Encoder names begin with ``beit/``.

    Attributes:
        source: the checkpoint's tensors.
        wanted: the model's parameters, and their names in the model.
        changes: what is adapted: of which tensors, and how.
        taken: what is taken over: of which tensor.
    """

    source: Mapping[str, np.ndarray]
    wanted: Mapping[str, str]
    changes: Mapping[str, tuple[tuple[str, ...], Adaptation]]
    taken: Mapping[str, str]

    @property
    def report(self) -> Report:
        used = {name for names, _ in self.changes.values() for name in names} | set(self.taken.values())
        return Report(
            adapted=tuple(sorted(self.changes)),
            dropped=tuple(sorted(self.source.keys() - used)),
            drawn=tuple(sorted(self.wanted.keys() - self.changes.keys() - self.taken.keys())),
        )


def checkpoint_report(checkpoint: NativeCheckpoint, target: BeitConfig) -> Report:
    """What `from_checkpoint` would do, found by names and shapes alone.

    Raises:
        BeitJaxError: as `from_checkpoint`.
    """
    return _transfer(checkpoint, target).report


def from_checkpoint(checkpoint: NativeCheckpoint, target: BeitConfig, key: Key[Array, ""]) -> tuple[Nested, Report]:
    """The parameters that training `target` starts from, float32 NumPy arrays, and what happened on the way.

    The encoder is taken over, its position tables and patch projection adapted by `beit_jax.models.adapt`. The norm
    before a masked-image head becomes the final norm of an encoder that pools its class token, and the other way round.
    For an encoder that pools the mean this norm is dropped, as in the original. A classifier is kept where
    `keeps_classifier` says so, and drawn anew otherwise.

    Args:
        key: draws what starts new, as `initial_params` does.

    Raises:
        BeitJaxError: the checkpoint lacks tensors of its own configuration, or is of another architecture; one line
            naming the tensor and both shapes.
    """
    transfer = _transfer(checkpoint, target)
    source, wanted, shapes = transfer.source, transfer.wanted, param_shapes(target)
    scheme: Scheme = "pretrain" if target.task == "masked_image_modeling" else "finetune"
    leaves: dict[str, np.ndarray | Array] = {name: source[origin] for name, origin in transfer.taken.items()}
    leaves |= {name: _adapted(name, source, *change, shapes[wanted[name]]) for name, change in transfer.changes.items()}
    fresh = _draw(target, scheme, key, (wanted[name] for name in transfer.report.drawn))
    params = {wanted[name]: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
    params |= {name: np.asarray(leaf) for name, leaf in fresh.items()}
    return unflatten(dict(sorted(params.items()))), transfer.report


def keeps_classifier(config: BeitConfig, target: BeitConfig) -> bool:
    """Whether a checkpoint's classifier means what the model's does: the same labels in the same order, read from the
    same features, of the same kind. Where the checkpoint does not say which kind, classes of which one holds, as in all
    published models; or, of a single output, any.
    """
    kinds: set[str | None] = {config.problem_type}
    if config.problem_type is None:
        kinds |= {target.problem_type} if config.num_labels == 1 else {"single_label_classification"}
    same = (config.labels, config.pooling) == (target.labels, target.pooling)
    return same and (target.problem_type is None or target.problem_type in kinds)


def head_change(config: BeitConfig, target: BeitConfig) -> str:
    """Why a checkpoint's classifier is not kept, for people; empty where it is, or where one of them has none."""
    both = config.task == target.task == "image_classification"
    if not both or keeps_classifier(config, target):
        return ""
    if config.labels != target.labels:
        now, before = (f"{len(labels):,} ({_some(labels)})" for labels in (target.labels, config.labels))
        return f"the head starts new: the data's labels are {now}, the checkpoint's {before}"
    if config.pooling != target.pooling:
        return f"the head starts new: it reads {target.pooling} features, the checkpoint's {config.pooling} features"
    return f"the head starts new: it is for {target.problem_type}, the checkpoint's for {config.problem_type or 'none'}"


def _some(labels: tuple[str, ...]) -> str:
    shown = [printable(label, 30) for label in labels[:3]]
    return ", ".join([*shown, "..."] if len(labels) > 3 else shown)


def _transfer(checkpoint: NativeCheckpoint, target: BeitConfig) -> _Transfer:
    _check_complete(checkpoint)
    _check_same_function(checkpoint.config, target)
    source = {_canonical(name, checkpoint.config): leaf for name, leaf in checkpoint.params.items()}
    wanted = {_canonical(name, target): name for name in param_shapes(target)}
    shapes = {name: param_shapes(target)[own] for name, own in wanted.items()}
    changes = adaptations(_as_classifier(checkpoint.config), _as_classifier(target))
    transfer = _Transfer(
        source, wanted, changes, _taken(source, checkpoint.config, target, shapes.keys() - changes.keys())
    )
    _check_accounted(source, shapes, transfer.report.drawn, transfer.report.dropped)
    for name, origin in transfer.taken.items():
        _check_shape(name, source[origin].shape, shapes[name])
    return transfer


def _canonical(name: str, config: BeitConfig) -> str:
    """Encoder names under ``beit/`` in every task; a model that is only an encoder has them bare."""
    return f"beit/{name}" if config.task == "features" else name


def _as_classifier(config: BeitConfig) -> BeitConfig:
    """A task whose encoder names begin with ``beit/``, which is all that adaptation reads of a task."""
    return replace(config.without_aggregation(), task="image_classification", embedding_size=0)


def _taken(
    source: Mapping[str, np.ndarray], config: BeitConfig, target: BeitConfig, names: Iterable[str]
) -> dict[str, str]:
    """Which source leaf each of the target's leaves `names` is, as far as there is one that means the same."""
    kept: Mapping[str, bool] = {
        "classifier": keeps_classifier(config, target),
        "lm_head": config.vocab_size == target.vocab_size,
    }
    result = {}
    for name in sorted(names):
        head = name.split("/")[-2]
        final_norm = (name, name.replace("beit/norm/", "norm/"), name.replace("norm/", "beit/norm/"))
        origin = next((origin for origin in final_norm if origin in source), None)
        if origin is not None and kept.get(head, True):
            result[name] = origin
    return result


def _adapted(
    name: str, source: Mapping[str, np.ndarray], origins: tuple[str, ...], adapt: Adaptation, shape: Shape
) -> np.ndarray:
    leaf = adapt({origin: source[origin].astype(np.float32) for origin in origins})
    _check_shape(name, leaf.shape, shape)
    return leaf


def _check_complete(checkpoint: NativeCheckpoint) -> None:
    expected = param_shapes(checkpoint.config)
    for name in sorted(expected.keys() ^ checkpoint.params.keys()):
        found = "missing" if name in expected else "unexpected"
        raise BeitJaxError(f"{printable(name)}: {found} in the checkpoint, by its own configuration; convert it again")
    for name, shape in expected.items():
        found_shape = checkpoint.params[name].shape
        if found_shape != shape:
            raise BeitJaxError(
                f"{printable(name)}: expected {list(shape)} by the checkpoint's own configuration, found "
                f"{list(found_shape)}; convert it again"
            )


def _check_same_function(source: BeitConfig, target: BeitConfig) -> None:
    """Differences of two configurations that no tensor shows."""
    for field in ("hidden_act", "layer_norm_eps"):
        old, new = getattr(source, field), getattr(target, field)
        if old != new:
            raise BeitJaxError(f"{field}: the checkpoint has {old}, the model {new}; give the model the checkpoint's")


def _check_accounted(
    source: Mapping[str, np.ndarray], shapes: Shapes, drawn: Iterable[str], dropped: Iterable[str]
) -> None:
    for name in sorted(drawn):
        if not first_match(_OPTIONAL, name):
            raise BeitJaxError(
                f"{name}: the model needs {list(shapes[name])}, the checkpoint has none; choose its variant"
            )
    for name in sorted(dropped):
        if not first_match(_OPTIONAL, name):
            raise BeitJaxError(
                f"{name}: the checkpoint has {list(source[name].shape)}, the model none; choose its variant"
            )


def _check_shape(name: str, found: Shape, expected: Shape) -> None:
    if found != expected:
        raise BeitJaxError(
            f"{name}: the checkpoint has {list(found)}, the model needs {list(expected)}; choose its variant"
        )
