"""The configuration of a model: one frozen dataclass, read from and written to Hugging Face's ``config.json``.

A field that means the same as in transformers 5.23's ``BeitConfig`` or ``Data2VecVisionConfig`` has its name. Where
transformers has a pair of booleans, this class has one named choice (`position_bias`, `pooling`).
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from beit_jax import config_file
from beit_jax.choices import (
    Activation,
    FeatureTaps,
    ModelType,
    Pooling,
    PositionBias,
    PositionResize,
    PresetName,
    ProblemType,
    Task,
    nearest,
)
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, read_json

__all__ = [
    "Activation",
    "BeitConfig",
    "FeatureTaps",
    "ModelType",
    "Pooling",
    "PositionBias",
    "PositionResize",
    "PresetName",
    "ProblemType",
    "Task",
]

LARGEST = (1 << 31) - 1
"""The largest size, as devices and files count."""

_CHOICES: Mapping[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in {
        "model_type": ModelType,
        "task": Task,
        "hidden_act": Activation,
        "pooling": Pooling,
        "position_bias": PositionBias,
        "position_resize": PositionResize,
        "feature_taps": FeatureTaps,
        "problem_type": ProblemType,
    }.items()
}


@dataclass(frozen=True)
class BeitConfig:
    """A BEiT or Data2Vec-Vision model.

    Attributes:
        model_type: the family of the checkpoint; the mathematics is the same.
        task: the head on the encoder.
        image_size, patch_size: pixels, (height, width), or one integer for both. Images of other sizes work: position
            tables are resized.
        layer_norm_eps: 1e-6 in the original code, timm and mmseg; 1e-12 by default in transformers.
        pooling: "mean": LayerNorm of the mean patch token, encoder output left un-normalised; "cls": the class token
            after a final LayerNorm.
        add_pooling_layer: a model without a head pools (transformers: BeitModel does, Data2VecVisionModel does not).
        position_bias: learned relative position bias of attention: one table for all layers, one per layer, or both.
        use_key_bias: the keys of attention have a bias too, as in ViT and BEiT-3; BEiT's queries and values alone do.
        use_sub_norm: BEiT-3's further norms: of the attended values before their projection, and of the MLP's hidden
            units before its second layer.
        embedding_size: of a model without a head: its pooled output is mapped to a vector of so many numbers and of
            length 1, as BEiT-3's retrieval compares with texts; 0: it is not.
        position_resize: how bias tables are resized to other image sizes: "geometric" as in the original code (cubic
            splines on a geometric grid), "geometric_linear" as in timm, "bilinear" as in transformers.
        layer_scale_init_value: initial layer scale; 0 means that the model has no layer scale.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0 at the first block.
        aggregate_from, aggregation_layers: BEiT v2's patch aggregation, for masked image modelling only. So many extra
            blocks read the final class token, and the patch tokens after block `aggregate_from`, counted from 1. 0
            means no aggregation.
        own_aggregation_head: the extra blocks predict by a norm and a head of their own, not by the model's.
        labels: class names in index order. Those of a file that numbers them otherwise than 0 to n - 1 remember its
            numbers (`config_file.NumberedNames`), with which they are written again.
        problem_type: what a classifier's outputs are, as transformers names it: it decides the loss in training and
            `score_function`. None: nobody has said.
        out_indices: the blocks whose outputs are used, for segmentation (four) and backbones; `feature_taps` says how
            they are counted.
        feature_taps: "original": index i is the output of block i, counted from 0, as the models were trained. "hf":
            index i is what transformers reads for it. In a backbone that is the output of block i, counted from 1. In
            segmentation it is the output of block i - 1, counted from 1: two blocks before the original one.
        add_fpn: for backbones: feature maps at strides 4, 8, 16, 32 (for a patch of 16) instead of the patch's stride.
        reshape_hidden_states: for backbones: maps without the class token, instead of token sequences with it.
        chained_pooling: for segmentation: every scale of the pooling pyramid reads the output of the one before, as
            transformers 4's TensorFlow code computes; else every scale reads the map itself.
        pool_scales, auxiliary_*, semantic_loss_ignore_index: for segmentation, as in transformers.

    Raises:
        BeitJaxError: the values describe no model.
    """

    model_type: ModelType = "beit"
    task: Task = "features"
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Activation = "gelu"
    layer_norm_eps: float = 1e-6
    pooling: Pooling = "mean"
    add_pooling_layer: bool = True
    position_bias: PositionBias = "none"
    position_resize: PositionResize = "bilinear"
    use_absolute_position_embeddings: bool = False
    use_mask_token: bool = False
    use_key_bias: bool = False
    use_sub_norm: bool = False
    embedding_size: int = 0
    layer_scale_init_value: float = 0.1
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02
    vocab_size: int = 8192
    aggregate_from: int = 0
    aggregation_layers: int = 0
    own_aggregation_head: bool = False
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    out_indices: tuple[int, ...] = ()
    feature_taps: FeatureTaps = "original"
    add_fpn: bool = False
    reshape_hidden_states: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    chained_pooling: bool = False
    use_auxiliary_head: bool = True
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    auxiliary_loss_weight: float = 0.4
    semantic_loss_ignore_index: int = 255

    def __post_init__(self) -> None:
        self._check_types()
        positive = ("num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*positive, *(["vocab_size"] if self.task == "masked_image_modeling" else [])):
            _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        for name in ("image_size", "patch_size"):
            _require(min(getattr(self, name)) > 0, name, "positive pixels", getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            _require(0.0 <= getattr(self, name) < 1.0, name, "a rate in [0, 1)", getattr(self, name))
        _require(self.layer_norm_eps <= 1.0, "layer_norm_eps", "at most 1", self.layer_norm_eps)
        for name in ("layer_norm_eps", "layer_scale_init_value", "initializer_range"):
            value = getattr(self, name)
            _require(value >= 0.0, name, "a number >= 0", value)
        if self.hidden_size % self.num_attention_heads:
            raise BeitJaxError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        sides = list(zip(self.image_size, self.patch_size, strict=True))
        if any(size % patch for size, patch in sides):
            below = tuple(max(size // patch, 1) * patch for size, patch in sides)
            above = tuple(-(-size // patch) * patch for size, patch in sides)
            raise BeitJaxError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"{below} and {above} are"
            )
        if self.aggregation_layers or self.aggregate_from or self.own_aggregation_head:
            self._check_aggregation()
        if self.embedding_size:
            _require(self.embedding_size > 0, "embedding_size", "0 or a positive integer", self.embedding_size)
            _require(self.task == "features" and self.has_pooler, "embedding_size", "0 without a pooled output", "more")
        if self.task in ("semantic_segmentation", "backbone"):
            self._check_taps()
        if self.task == "semantic_segmentation":
            self._check_segmentation()

    def _check_types(self) -> None:
        """Refuses a word that is none of a closed list; a size may be one integer, a list becomes a tuple."""
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name not in _CHOICES:
                object.__setattr__(self, name, _checked(name, value, field.default))
            elif value not in _CHOICES[name] and (value is not None or name != "problem_type"):
                near = nearest(value, _CHOICES[name]) if isinstance(value, str) else None
                advice = f"; did you mean {near}?" if near else ""
                expected = " or ".join(_CHOICES[name])
                raise BeitJaxError(f"{name}: expected {expected}, found {printable(value)}{advice}")

    def _check_aggregation(self) -> None:
        depth = self.num_hidden_layers
        _require(self.task == "masked_image_modeling", "aggregation_layers", f"0 for {self.task}", "more")
        _require(self.aggregation_layers > 0, "aggregation_layers", "a positive integer", self.aggregation_layers)
        _require(0 < self.aggregate_from <= depth, "aggregate_from", f"a block, 1 to {depth}", self.aggregate_from)

    def without_aggregation(self) -> "BeitConfig":
        """Returns the model without its extra blocks, which only pre-training has a use for."""
        return replace(self, aggregate_from=0, aggregation_layers=0, own_aggregation_head=False)

    def _check_taps(self) -> None:
        states, last = self.tapped_states, self.num_hidden_layers
        count = 4 if self.task == "semantic_segmentation" or self.add_fpn else None
        _require(
            len(states) == (count or max(1, len(states)))
            and all(0 <= state <= last for state in states)
            and list(states) == sorted(set(states)),
            "out_indices",
            f"{'four' if count else 'some'} growing indices of the {last} blocks",
            list(self.out_indices),
        )

    def _check_segmentation(self) -> None:
        _require(self.num_labels > 0, "labels", "the names of the classes", "none")
        _require(
            len(self.pool_scales) > 0 and min(self.pool_scales) > 0,
            "pool_scales",
            "positive integers",
            list(self.pool_scales),
        )
        if self.has_auxiliary_head:
            for name in ("auxiliary_channels", "auxiliary_num_convs"):
                _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        weight = self.auxiliary_loss_weight
        _require(weight >= 0, "auxiliary_loss_weight", "a number >= 0", weight)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches, (rows, columns), at the native image size."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def score_function(self) -> Literal["softmax", "sigmoid"] | None:
        """What makes probabilities of a classifier's outputs; None for regression, whose outputs are values.

        Source: transformers 5.23 pipelines/image_classification.py, `postprocess`.
        """
        if self.problem_type == "regression":
            return None
        return "sigmoid" if self.problem_type == "multi_label_classification" or self.num_labels == 1 else "softmax"

    @property
    def has_shared_bias(self) -> bool:
        return self.position_bias in ("shared", "both")

    @property
    def has_layer_bias(self) -> bool:
        return self.position_bias in ("per_layer", "both")

    @property
    def has_pooler(self) -> bool:
        return self.task == "image_classification" or (self.task == "features" and self.add_pooling_layer)

    @property
    def has_auxiliary_head(self) -> bool:
        return self.task == "semantic_segmentation" and self.use_auxiliary_head

    @property
    def tapped_states(self) -> tuple[int, ...]:
        """`out_indices` as indices of hidden states: 0 is the embeddings, i the output of block i, counted from 1."""
        offset = 1 if self.feature_taps == "original" else -1 if self.task == "semantic_segmentation" else 0
        return tuple(index + offset for index in self.out_indices)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, file: str = "config.json") -> "BeitConfig":
        """Reads a parsed Hugging Face ``config.json`` (transformers 4 or 5).

        Keys that are absent take transformers' defaults, and others are not read.

        Raises:
            BeitJaxError: another model family, another head, or a value of the wrong type; names `file` and the key.
        """
        values = config_file.read_fields(Fields(config, file))
        try:
            return cls(**values)
        except BeitJaxError as error:
            raise BeitJaxError(f"{file}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of which transformers builds the same model; ``from_hf(to_hf(c)) == c``."""
        return config_file.written(self)

    @classmethod
    def from_file(cls, path: str | Path) -> "BeitConfig":
        """`from_hf` of a file.

        Raises:
            BeitJaxError: the file is missing, is no JSON object, or describes no model of this family.
        """
        return cls.from_hf(read_json(Path(path)), file=str(path))


# --- Types of fields --------------------------------------------------------------------------------------------------


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raises `BeitJaxError` with the name, what was expected and what was found, unless the condition holds."""
    if not condition:
        raise BeitJaxError(f"{name}: expected {expected}, found {printable(found)}")


def _checked(name: str, value: Any, default: Any) -> Any:
    """A value of a field as the type of its default: bool, int, float, a pair or other tuple of integers, or of text.

    NumPy's scalars and lists are taken too; True is no integer.

    Raises:
        BeitJaxError: a value of another type, or an integer beyond `LARGEST`.
    """
    if isinstance(default, bool):
        _require(type(value).__name__ in ("bool", "bool_"), name, "True or False", value)
        return bool(value)
    if isinstance(default, int):
        return _integer(name, value, "an integer")
    if isinstance(default, float):
        return _number(name, value)
    if name == "labels":
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        _require(listed and all(isinstance(label, str) for label in value), name, "the names of classes", value)
        return value if isinstance(value, config_file.NumberedNames) else tuple(value)
    if name in ("image_size", "patch_size"):
        return _pair(name, value)
    _require(isinstance(value, Sequence) and not isinstance(value, str), name, "integers", value)
    return tuple(_integer(name, item, "integers") for item in value)


def _integer(name: str, value: Any, expected: str) -> int:
    number: int | None
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    _require(number is not None and not isinstance(value, bool), name, expected, value)
    assert number is not None
    _require(abs(number) <= LARGEST, name, f"at most {LARGEST}", value)
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    _require(math.isfinite(number), name, "a finite number", value)
    return number


def _pair(name: str, value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    expected = "a number of pixels, or (height, width)"
    _require(len(sides) == 2, name, expected, value)
    return _integer(name, sides[0], expected), _integer(name, sides[1], expected)
