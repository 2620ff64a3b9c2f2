"""Hugging Face's ``config.json``: the fields of `BeitConfig` in it, class names, and what is written."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from beit_jax.choices import Activation, FeatureTaps, ModelType, PositionBias, PositionResize, ProblemType, Task
from beit_jax.errors import BeitJaxError, printable

if TYPE_CHECKING:
    from beit_jax.config import BeitConfig
    from beit_jax.json_file import Fields

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
# Fields for which transformers has no keys, written under ``beit_jax`` by models that have what they say.
_OWN_DEFAULTS: Mapping[str, Any] = {
    "aggregate_from": 0,
    "aggregation_layers": 0,
    "own_aggregation_head": False,
    "use_key_bias": False,
    "use_sub_norm": False,
    "embedding_size": 0,
    "chained_pooling": False,
}
_OTHER_MODEL_KEYS = (
    "model_type architectures image_size patch_size hidden_act use_mean_pooling use_relative_position_bias id2label "
    "label2id use_shared_relative_position_bias num_labels problem_type beit_jax"
).split()
# Keys that any transformers configuration may have, and keys that only some heads read: no reason for a note.
_IGNORED_KEYS = (
    "_name_or_path _attn_implementation _attn_implementation_autoset transformers_version torch_dtype dtype "
    "auto_map return_dict output_hidden_states output_attentions torchscript use_bfloat16 "
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

KNOWN_KEYS = (*_HF_DEFAULTS, *_OTHER_MODEL_KEYS, *_IGNORED_KEYS)
"""Every key that a configuration may have; any other is not read."""


def read_fields(read: "Fields") -> dict[str, Any]:
    """The fields of a `BeitConfig`, see `BeitConfig.from_hf`."""
    model_type = read.choice("model_type", get_args(ModelType), None)
    bias = (
        read.typed("use_shared_relative_position_bias", bool, False),
        read.typed("use_relative_position_bias", bool, False),
    )
    values: dict[str, Any] = {name: read.typed(name, type(value), value) for name, value in _HF_DEFAULTS.items()}
    values |= {
        "model_type": model_type,
        "task": _task(read, model_type),
        "hidden_act": _activation(read),
        "problem_type": _problem_type(read),
        "image_size": read.pair("image_size", 224),
        "patch_size": read.pair("patch_size", 16),
        "pooling": "mean" if read.typed("use_mean_pooling", bool, True) else "cls",
        "position_bias": _POSITION_BIAS[bias],
        # transformers reads any value <= 0 as "no layer scale".
        "layer_scale_init_value": max(0.0, values["layer_scale_init_value"]),
        "add_pooling_layer": model_type == "beit",
    }
    if values["task"] in ("image_classification", "semantic_segmentation"):
        values["labels"] = read_labels(read)
    values |= _dense_fields(read, values["task"], model_type, values["num_hidden_layers"])
    values |= _own_fields(read)
    return values


def _activation(read: "Fields") -> Activation:
    if read.content.get("hidden_act") == "swish":  # transformers has both names for one function
        return "silu"
    found: Activation = read.choice("hidden_act", get_args(Activation), "gelu")
    return found


def _problem_type(read: "Fields") -> ProblemType | None:
    if read.content.get("problem_type") is None:
        return None
    found: ProblemType = read.choice("problem_type", get_args(ProblemType), None)
    return found


def _task(read: "Fields", model_type: ModelType) -> Task:
    known = {_CLASS_PREFIX[model_type] + suffix: task for task, suffix in _CLASS_SUFFIX.items()}
    names = read.content.get("architectures") or [_CLASS_PREFIX[model_type] + "Model"]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in known:
        raise read.error("architectures", "one of " + ", ".join(known))
    return known[names[0]]


def _dense_fields(read: "Fields", task: Task, model_type: ModelType, layers: int) -> dict[str, Any]:
    """Reads the fields of segmentation models and backbones."""
    if task not in ("semantic_segmentation", "backbone"):
        return {}
    defaults = _SEGMENTATION_DEFAULTS if task == "semantic_segmentation" else _BACKBONE_DEFAULTS
    found = {name: read.typed(name, type(value), value) for name, value in defaults.items()}
    if task == "semantic_segmentation":
        found["pool_scales"] = read.integers("pool_scales", (1, 2, 3, 6))
    names = read.content.get("out_features")
    stages = [_stage(name, layers) for name in names] if isinstance(names, list) else [None]
    if read.content.get("out_indices") is None and None not in stages:
        indices: tuple[int, ...] = tuple(stage for stage in stages if stage is not None)
    else:
        key = "out_indices" if read.content.get("out_indices") is not None else "segmentation_indices"
        indices = read.integers(key, (3, 5, 7, 11) if model_type == "data2vec-vision" else (layers,))
    found["out_indices"] = tuple(i + layers + 1 if i < 0 else i for i in indices)
    found["feature_taps"] = "hf"
    return found


def _stage(name: object, layers: int) -> int | None:
    """The hidden state that transformers calls "stem" or "stage" and a number; None for any other name."""
    if name == "stem":
        return 0
    digits = name.removeprefix("stage") if isinstance(name, str) and name.startswith("stage") else ""
    number = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else 0
    return number if 0 < number <= layers and digits == str(number) else None


def _own_fields(read: "Fields") -> dict[str, Any]:
    """Reads the fields under the key ``beit_jax``, for which transformers' configuration has no keys."""
    own = read.inside("beit_jax")
    found: dict[str, Any] = {}
    if "position_resize" in own.content:
        found["position_resize"] = own.choice("position_resize", get_args(PositionResize), None)
    if "add_pooling_layer" in own.content:
        found["add_pooling_layer"] = own.typed("add_pooling_layer", bool, True)
    for name, default in _OWN_DEFAULTS.items():
        if name in own.content:
            found[name] = own.typed(name, type(default), default)
    if "feature_taps" in own.content:
        found["feature_taps"] = own.choice("feature_taps", get_args(FeatureTaps), None)
    return found


def written(config: "BeitConfig") -> dict[str, Any]:
    """The ``config.json`` of a configuration, see `BeitConfig.to_hf`."""

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
    if config.problem_type is not None:
        result["problem_type"] = config.problem_type
    if config.task in ("image_classification", "semantic_segmentation"):
        numbered = list(zip(label_numbers(config.labels), config.labels, strict=True))
        result["id2label"] = {str(number): label for number, label in numbered}
        result["label2id"] = {label: number for number, label in numbered}
    result["beit_jax"] = {
        "position_resize": config.position_resize,
        "add_pooling_layer": config.add_pooling_layer,
    }
    own = {name: getattr(config, name) for name in _OWN_DEFAULTS}
    result["beit_jax"] |= {name: value for name, value in own.items() if value}
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


# --- Class names ------------------------------------------------------------------------------------------------------

MOST_LABELS = 1_000_000
"""The most classes that a configuration may count without naming them; the largest published model has 21,841."""
_NUMBER = re.compile(r"\s*\+?([0-9]{1,18})(\.0*)?\s*")


class NumberedNames(tuple[str, ...]):
    """Class names in the order of the outputs, from a map whose numbers are not 0 to n - 1.

    It is a tuple of the names and equals one. Whoever gives a model other names gives it their usual numbers, too.

    Attributes:
        numbers: the number of every name, as they are written again.
    """

    numbers: tuple[int, ...]

    def __new__(cls, names: Iterable[str], numbers: Iterable[int] = ()) -> "NumberedNames":
        self = super().__new__(cls, names)
        self.numbers = tuple(numbers)
        return self


def label_numbers(labels: Sequence[str]) -> Sequence[int]:
    """The numbers of classes in ``id2label``: 0 to n - 1, unless the file they are from has others."""
    numbers = labels.numbers if isinstance(labels, NumberedNames) else ()
    return numbers or range(len(labels))


def read_labels(read: "Fields") -> tuple[str, ...]:
    """The class names in the order of their outputs; `NumberedNames` where their numbers are not 0 to n - 1.

    Numbers are read in their order, because transformers makes an output for every name: its own conversion of BEiT's
    22k models took two classes out and left the numbers of the others. A name that is null is ``LABEL_i``. Without
    ``id2label``, ``label2id`` gives the names, and without both ``num_labels`` their count, by transformers' default 2.

    Raises:
        BeitJaxError: keys that are no numbers or stand for one number, names that are neither text nor numbers.
    """
    if read.content.get("id2label") is None:
        return _labels_of_numbers(read)
    names = read.typed("id2label", dict, {})
    numbers = {_number_of(read, key): key for key in names}
    if len(numbers) != len(names):
        raise BeitJaxError(
            f"{read.file}: id2label: expected one name for every number, found a number twice; {_AS_MAP}"
        )
    order = sorted(numbers)
    labels = [_name(read, number, names[numbers[number]]) for number in order]
    return tuple(labels) if order == list(range(len(order))) else NumberedNames(labels, order)


def _labels_of_numbers(read: "Fields") -> tuple[str, ...]:
    """The names that ``label2id`` gives, if it numbers all outputs; else ``LABEL_i``."""
    stated = read.content.get("num_labels") is not None
    count = read.typed("num_labels", int, 2) if stated else 2
    if not 0 <= count <= MOST_LABELS:
        raise read.error("num_labels", f"0 to {MOST_LABELS}")
    names = names_by_number(read.content.get("label2id"))
    if names is None or (stated and len(names) != count):
        return tuple(f"LABEL_{i}" for i in range(count))
    order = sorted(names)
    labels = [names[number] for number in order]
    return tuple(labels) if order == list(range(len(order))) else NumberedNames(labels, order)


def names_by_number(label2id: Any) -> dict[int, str] | None:
    """The names of a ``label2id`` by their numbers; None if it is no map of names to numbers of their own."""
    if not isinstance(label2id, Mapping) or not label2id:
        return None
    numbers = {name: class_number(value) for name, value in label2id.items()}
    names = {number: name for name, number in numbers.items() if number is not None and isinstance(name, str)}
    return names if len(names) == len(label2id) else None


_AS_MAP = 'write it as {"0": "first name", "1": "second name", ...}, or num_labels in its place'


def _number_of(read: "Fields", key: object) -> int:
    number = class_number(key)
    if number is None:
        exchanged = all(class_number(value) is not None for value in read.content["id2label"].values())
        way = "are id2label and label2id exchanged?" if exchanged and isinstance(key, str) else _AS_MAP
        raise BeitJaxError(f"{read.file}: id2label: expected numbers as keys, found {printable(key)}; {way}")
    return number


def class_number(value: object) -> int | None:
    """A number of a class: an integer of at least 0, or text or a float that is one ("01", "1.0"); None otherwise."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        return int(match[1]) if match and value.isascii() else None
    return value if type(value) is int and 0 <= value < 10**18 else None


def _name(read: "Fields", number: int, name: Any) -> str:
    if name is None:
        return f"LABEL_{number}"
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        raise BeitJaxError(
            f"{read.file}: id2label: expected text as the name of a class, found {printable(name, 60)}; {_AS_MAP}"
        )
    return name if isinstance(name, str) else printable(name)
