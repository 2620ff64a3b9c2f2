"""The configuration of a model: one frozen dataclass, read from and written to Hugging Face's ``config.json``.

A field that means the same as in transformers 5.23's ``BeitConfig`` or ``Data2VecVisionConfig`` has its name. Where
transformers has a pair of booleans, this class has one named choice (`position_bias`, `pooling`).
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, read_json

ModelType = Literal["beit", "data2vec-vision"]
Task = Literal["features", "masked_image_modeling", "image_classification", "semantic_segmentation", "backbone"]
PositionBias = Literal["none", "shared", "per_layer", "both"]
Pooling = Literal["mean", "cls"]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
PositionResize = Literal["bilinear", "geometric", "geometric_linear"]
FeatureTaps = Literal["original", "hf"]
PresetName = Literal["hf", "unilm_eval", "timm"]  # of images; see `beit_jax.images.processor.preset`


@dataclass(frozen=True)
class BeitConfig:
    """A BEiT or Data2Vec-Vision model.

    Attributes:
        model_type: the family of the checkpoint; the mathematics is the same.
        task: the head on the encoder.
        image_size, patch_size: pixels, (height, width). Images of other sizes work: position tables are resized.
        layer_norm_eps: 1e-6 in the original code, timm and mmseg; 1e-12 by default in transformers.
        pooling: "mean": LayerNorm of the mean patch token, encoder output left un-normalised; "cls": the class token
            after a final LayerNorm.
        add_pooling_layer: a model without a head pools (transformers: BeitModel does, Data2VecVisionModel does not).
        position_bias: learned relative position bias of attention: one table for all layers, one per layer, or both.
        position_resize: how bias tables are resized to other image sizes: "geometric" as in the original code (cubic
            splines on a geometric grid), "geometric_linear" as in timm, "bilinear" as in transformers.
        layer_scale_init_value: initial layer scale; 0 means that the model has no layer scale.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0 at the first block.
        aggregate_from, aggregation_layers: BEiT v2's patch aggregation, for masked image modelling only. So many extra
            blocks read the final class token, and the patch tokens after block `aggregate_from`, counted from 1. 0
            means no aggregation.
        labels: class names in index order.
        out_indices: the blocks whose outputs are used, for segmentation (four) and backbones; `feature_taps` says how
            they are counted.
        feature_taps: "original": index i is the output of block i, counted from 0, as the models were trained. "hf":
            index i is what transformers reads for it. In a backbone that is the output of block i, counted from 1. In
            segmentation it is the output of block i - 1, counted from 1: two blocks before the original one.
        add_fpn: for backbones: feature maps at strides 4, 8, 16, 32 (for a patch of 16) instead of the patch's stride.
        reshape_hidden_states: for backbones: maps without the class token, instead of token sequences with it.
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
    layer_scale_init_value: float = 0.1
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02
    vocab_size: int = 8192
    aggregate_from: int = 0
    aggregation_layers: int = 0
    labels: tuple[str, ...] = ()
    out_indices: tuple[int, ...] = ()
    feature_taps: FeatureTaps = "original"
    add_fpn: bool = False
    reshape_hidden_states: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    auxiliary_loss_weight: float = 0.4
    semantic_loss_ignore_index: int = 255

    def __post_init__(self) -> None:
        positive = ("num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*positive, "vocab_size"):
            _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        for name in ("image_size", "patch_size"):
            _require(min(getattr(self, name)) > 0, name, "positive pixels", getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            _require(0.0 <= getattr(self, name) < 1.0, name, "a rate in [0, 1)", getattr(self, name))
        for name in ("layer_norm_eps", "layer_scale_init_value", "initializer_range"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0.0, name, "a finite number >= 0", value)
        if self.hidden_size % self.num_attention_heads:
            raise BeitJaxError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise BeitJaxError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.aggregation_layers or self.aggregate_from:
            self._check_aggregation()
        if self.task in ("semantic_segmentation", "backbone"):
            self._check_taps()
        if self.task == "semantic_segmentation":
            self._check_segmentation()

    def _check_aggregation(self) -> None:
        depth = self.num_hidden_layers
        _require(self.task == "masked_image_modeling", "aggregation_layers", f"0 for {self.task}", "more")
        _require(self.aggregation_layers > 0, "aggregation_layers", "a positive integer", self.aggregation_layers)
        _require(0 < self.aggregate_from <= depth, "aggregate_from", f"a block, 1 to {depth}", self.aggregate_from)

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
        _require(self.auxiliary_channels > 0, "auxiliary_channels", "a positive integer", self.auxiliary_channels)
        _require(self.auxiliary_num_convs > 0, "auxiliary_num_convs", "a positive integer", self.auxiliary_num_convs)
        weight = self.auxiliary_loss_weight
        _require(math.isfinite(weight) and weight >= 0, "auxiliary_loss_weight", "a finite number >= 0", weight)

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
    def has_shared_bias(self) -> bool:
        return self.position_bias in ("shared", "both")

    @property
    def has_layer_bias(self) -> bool:
        return self.position_bias in ("per_layer", "both")

    @property
    def has_pooler(self) -> bool:
        return self.task == "image_classification" or (self.task == "features" and self.add_pooling_layer)

    @property
    def tapped_states(self) -> tuple[int, ...]:
        """`out_indices` as indices of hidden states: 0 is the embeddings, i the output of block i, counted from 1."""
        offset = 1 if self.feature_taps == "original" else -1 if self.task == "semantic_segmentation" else 0
        return tuple(index + offset for index in self.out_indices)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, file: str = "config.json") -> "BeitConfig":
        """Reads a parsed Hugging Face ``config.json`` (transformers 4 or 5).

        Keys that are absent take transformers' defaults. `hf_notes` describes the keys that are not read.

        Raises:
            BeitJaxError: another model family, another head, or a value of the wrong type; names `file` and the key.
        """
        return _from_hf(config, file)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of which transformers builds the same model; ``from_hf(to_hf(c)) == c``."""
        return _to_hf(self)

    @classmethod
    def from_file(cls, path: Path) -> "BeitConfig":
        """`from_hf` of a file.

        Raises:
            BeitJaxError: the file is missing, is no JSON object, or describes no model of this family.
        """
        return cls.from_hf(read_json(path), file=str(path))


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise BeitJaxError(f"{name}: expected {expected}, found {printable(found)}")


# --- Hugging Face's config.json ---------------------------------------------------------------------------------------

_CLASS_PREFIX: Mapping[ModelType, str] = {"beit": "Beit", "data2vec-vision": "Data2VecVision"}
_CLASS_SUFFIX: Mapping[Task, str] = {
    "features": "Model",
    "masked_image_modeling": "ForMaskedImageModeling",
    "image_classification": "ForImageClassification",
    "semantic_segmentation": "ForSemanticSegmentation",
    "backbone": "Backbone",
}
_POSITION_BIAS: Mapping[tuple[bool, bool], PositionBias] = {
    (False, False): "none",
    (True, False): "shared",
    (False, True): "per_layer",
    (True, True): "both",
}
# Fields that have the same name and meaning in transformers, with the defaults of transformers 5.23.
_HF_DEFAULTS: Mapping[str, Any] = {
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "use_absolute_position_embeddings": False,
    "use_mask_token": False,
    "layer_scale_init_value": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "initializer_range": 0.02,
    "vocab_size": 8192,
}
# The same, read and written only for these tasks.
_SEGMENTATION_DEFAULTS: Mapping[str, Any] = {
    "use_auxiliary_head": True,
    "auxiliary_channels": 256,
    "auxiliary_num_convs": 1,
    "auxiliary_concat_input": False,
    "auxiliary_loss_weight": 0.4,
    "semantic_loss_ignore_index": 255,
}
_BACKBONE_DEFAULTS: Mapping[str, Any] = {"add_fpn": False, "reshape_hidden_states": True}
_OTHER_MODEL_KEYS = (
    "model_type architectures image_size patch_size hidden_act use_mean_pooling use_relative_position_bias id2label "
    "label2id use_shared_relative_position_bias num_labels beit_jax"
).split()
# Keys that any transformers configuration may have, and keys that only some heads read: no reason for a note.
_IGNORED_KEYS = (
    "_name_or_path _attn_implementation _attn_implementation_autoset transformers_version torch_dtype dtype "
    "auto_map problem_type return_dict output_hidden_states output_attentions torchscript use_bfloat16 "
    "chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention tie_word_embeddings "
    "tie_encoder_decoder finetuning_task cross_attention_hidden_size task_specific_params pruned_heads "
    "gradient_checkpointing bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
    "tokenizer_class prefix out_indices out_features _out_features _out_indices stage_names segmentation_indices "
    "pool_scales use_auxiliary_head auxiliary_loss_weight auxiliary_channels auxiliary_num_convs "
    "auxiliary_concat_input semantic_loss_ignore_index add_fpn reshape_hidden_states max_length min_length "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens use_cache"
).split()


def _from_hf(config: Mapping[str, Any], file: str) -> BeitConfig:
    read = Fields(config, file)
    model_type = read.choice("model_type", get_args(ModelType), None)
    bias = (
        read.typed("use_shared_relative_position_bias", bool, False),
        read.typed("use_relative_position_bias", bool, False),
    )
    values: dict[str, Any] = {name: read.typed(name, type(value), value) for name, value in _HF_DEFAULTS.items()}
    values |= {
        "model_type": model_type,
        "task": _task(read, model_type),
        "hidden_act": read.choice("hidden_act", get_args(Activation), "gelu"),
        "image_size": read.pair("image_size", 224),
        "patch_size": read.pair("patch_size", 16),
        "pooling": "mean" if read.typed("use_mean_pooling", bool, True) else "cls",
        "position_bias": _POSITION_BIAS[bias],
        # transformers reads any value <= 0 as "no layer scale".
        "layer_scale_init_value": max(0.0, values["layer_scale_init_value"]),
        "add_pooling_layer": model_type == "beit",
    }
    if values["task"] in ("image_classification", "semantic_segmentation"):
        values["labels"] = _labels(read)
    values |= _dense_fields(read, values["task"], model_type, values["num_hidden_layers"])
    values |= _own_fields(read)
    try:
        return BeitConfig(**values)
    except BeitJaxError as error:
        raise BeitJaxError(f"{file}: {error}") from None


def _task(read: Fields, model_type: ModelType) -> Task:
    known = {_CLASS_PREFIX[model_type] + suffix: task for task, suffix in _CLASS_SUFFIX.items()}
    names = read.content.get("architectures") or [_CLASS_PREFIX[model_type] + "Model"]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise read.error("architectures", "one of " + ", ".join(known))
    return known[names[0]]


def _labels(read: Fields) -> tuple[str, ...]:
    """Class names by index. A file with a count only gives ``LABEL_i``; transformers' default is two classes."""
    if read.content.get("id2label") is None:
        return tuple(f"LABEL_{i}" for i in range(read.typed("num_labels", int, 2)))
    names = read.typed("id2label", dict, {})
    if set(names) != {str(i) for i in range(len(names))}:
        raise read.error("id2label", 'an object with the keys "0" to "n-1"')
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _dense_fields(read: Fields, task: Task, model_type: ModelType, layers: int) -> dict[str, Any]:
    """Reads the fields of segmentation models and backbones."""
    if task not in ("semantic_segmentation", "backbone"):
        return {}
    defaults = _SEGMENTATION_DEFAULTS if task == "semantic_segmentation" else _BACKBONE_DEFAULTS
    found = {name: read.typed(name, type(value), value) for name, value in defaults.items()}
    if task == "semantic_segmentation":
        found["pool_scales"] = read.integers("pool_scales", (1, 2, 3, 6))
    names = read.content.get("out_features")
    stages = ["stem", *(f"stage{i}" for i in range(1, layers + 1))]
    if isinstance(names, list) and read.content.get("out_indices") is None and set(names) <= set(stages):
        indices = tuple(stages.index(name) for name in names)
    else:
        key = "out_indices" if read.content.get("out_indices") is not None else "segmentation_indices"
        indices = read.integers(key, (3, 5, 7, 11) if model_type == "data2vec-vision" else (layers,))
    found["out_indices"] = tuple(i + len(stages) if i < 0 else i for i in indices)
    found["feature_taps"] = "hf"
    return found


def _own_fields(read: Fields) -> dict[str, Any]:
    """Reads the fields under the key ``beit_jax``, for which transformers' configuration has no keys."""
    own = Fields(read.typed("beit_jax", dict, {}), f"{read.file}: beit_jax")
    found: dict[str, Any] = {}
    if "position_resize" in own.content:
        found["position_resize"] = own.choice("position_resize", get_args(PositionResize), None)
    if "add_pooling_layer" in own.content:
        found["add_pooling_layer"] = own.typed("add_pooling_layer", bool, True)
    for name in ("aggregate_from", "aggregation_layers"):
        if name in own.content:
            found[name] = own.typed(name, int, 0)
    if "feature_taps" in own.content:
        found["feature_taps"] = own.choice("feature_taps", get_args(FeatureTaps), None)
    return found


def hf_notes(config: Mapping[str, Any], *, file: str = "config.json") -> list[str]:
    """Notes for the user on a Hugging Face configuration that is read without an error: unknown keys, remote code."""
    notes = []
    if "auto_map" in config:
        notes.append(f"{file}: auto_map names code to import; ignored, nothing of it is run")
    known = [*_HF_DEFAULTS, *_OTHER_MODEL_KEYS, *_IGNORED_KEYS]
    for key in sorted(set(config) - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        notes.append(f"{file}: unknown key {printable(key)} ignored{hint}")
    return notes


def _to_hf(config: BeitConfig) -> dict[str, Any]:
    def side(size: tuple[int, int]) -> int | list[int]:
        return size[0] if size[0] == size[1] else list(size)

    result: dict[str, Any] = {
        "model_type": config.model_type,
        "architectures": [_CLASS_PREFIX[config.model_type] + _CLASS_SUFFIX[config.task]],
        "image_size": side(config.image_size),
        "patch_size": side(config.patch_size),
        "use_mean_pooling": config.pooling == "mean",
        "use_relative_position_bias": config.has_layer_bias,
        "use_shared_relative_position_bias": config.has_shared_bias,
        "hidden_act": config.hidden_act,
    } | {name: getattr(config, name) for name in _HF_DEFAULTS}
    if config.task in ("image_classification", "semantic_segmentation"):
        result["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        result["label2id"] = {label: i for i, label in enumerate(config.labels)}
    result["beit_jax"] = {
        "position_resize": config.position_resize,
        "add_pooling_layer": config.add_pooling_layer,
    }
    if config.aggregation_layers:
        result["beit_jax"] |= {
            "aggregate_from": config.aggregate_from,
            "aggregation_layers": config.aggregation_layers,
        }
    if config.task in ("semantic_segmentation", "backbone"):
        # With original taps, transformers reads other blocks for the same indices, and it refuses the indices of the
        # right blocks, which go one beyond the last. The recorded choice lets this library read the right ones.
        result["out_indices"] = list(config.out_indices)
        result["beit_jax"]["feature_taps"] = config.feature_taps
    if config.task == "semantic_segmentation":
        result |= {name: getattr(config, name) for name in _SEGMENTATION_DEFAULTS}
        result["pool_scales"] = list(config.pool_scales)
    if config.task == "backbone":
        result |= {name: getattr(config, name) for name in _BACKBONE_DEFAULTS}
    return result
