"""The names of variables in files of Keras 3, and of ``.weights.h5`` and ``.keras`` of Keras 2.12 and later.

These files keep a variable as ``layers/dense_3/vars/0``: its layer by class and number among the layers of this class,
itself by its number in the layer. The layer's own name is taken from the attribute ``name`` of its group (Keras 3.5 and
later), or by the numbers from the configuration in a ``.keras`` archive. A file with neither is that of
keras_cv_attention_models' BEiT if its layers are exactly those, in the order of the model.
Source: keras 3.15.1 src/saving/saving_lib.py, tf_keras 2.21 src/saving/saving_lib.py.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_NUMBERED = re.compile(r"(?:(.*)/)?vars/(\d{1,6})")
# What compiled models keep of their training: top-level entries, and the state of random numbers in any layer.
_TRAINING = re.compile(
    r"_?(optimizer|optimizers|loss_tracker|metrics|compile_metrics|loss)/.*|(.*/)?_?(seed_generator|random_generator)/.*"
)


def are_numbered(paths: Collection[str]) -> bool:
    """True if variables have numbers in place of names."""
    return all(_NUMBERED.fullmatch(path) for path in paths)


def is_of_training(path: str) -> bool:
    """True for a variable of the optimizer, of a metric, or of a generator of random numbers."""
    return _TRAINING.fullmatch(path) is not None and _NUMBERED.fullmatch(path) is not None


def groups_above(path: str) -> Iterator[str]:
    """Yields the groups of variables of the layers that a variable lies in, from the outermost: ``a/vars``."""
    parts = path.split("/")[:-2]
    for i in range(1, len(parts) + 1):
        yield "/".join([*parts[:i], "vars"])


def of_numbered(
    paths: Collection[str], told: Mapping[str, str], model: Mapping[str, Any] | None
) -> tuple[dict[str, str], str | None]:
    """Returns a name for every variable, and by what its layer is known; the paths themselves where nothing tells it.

    A name is those of the layers, the outermost first, ``vars`` and the number: ``beit/block0_attn_ln/vars/1``.

    Args:
        told: the names of layers by the group of their variables, as the file tells them.
        model: the configuration of the model.
    """
    if told:
        return _joined(paths, told), "names of layers"
    if model is not None:
        return _joined(paths, dict(_configured(model, ""))), "the model's configuration"
    ordered = dict(_kecam(paths))
    return _joined(paths, ordered), "the order of keras_cv_attention_models' layers" if ordered else None


def _joined(paths: Collection[str], layers: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for path in paths:
        groups = list(groups_above(path))
        known = [layers[group] for group in groups if group in layers]
        complete = bool(groups) and groups[-1] in layers
        found[path] = "/".join([*known, *path.split("/")[-2:]]) if complete else path
    return found


def _configured(model: Mapping[str, Any], before: str) -> Iterator[tuple[str, str]]:
    """The group and the name of every layer in a model's configuration, and in the models among its layers."""
    counts: Counter[str] = Counter()
    for layer in layers_of(model):
        kind = _snake_case(str(layer.get("class_name")))
        path = f"{before}layers/{kind}_{counts[kind]}" if counts[kind] else f"{before}layers/{kind}"
        counts[kind] += 1
        name = layer.get("name") or settings_of(layer).get("name")
        if isinstance(name, str):
            yield f"{path}/vars", name
        if path.count("/") < _DEPTH:
            yield from _configured(layer, f"{path}/")


def layers_of(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The layers in the configuration of a model or of a layer, in their order."""
    found = settings_of(model).get("layers")
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def settings_of(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a layer or a model; nothing where it states none."""
    found = layer.get("config")
    return found if isinstance(found, Mapping) else {}


def _snake_case(name: str) -> str:
    """Keras' name for a class: ``LayerNormalization`` becomes ``layer_normalization``."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _kecam(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """The groups and names of the layers of keras_cv_attention_models' BEiT; nothing if there are others or fewer.

    Every class of layers stands in the order of the model: source keras_cv_attention_models 1.4.3 beit/beit.py.
    """
    kinds: Counter[str] = Counter()
    for layer in {path.rpartition("/vars/")[0] for path in paths}:
        match = re.fullmatch(r"(?:layers|_layer_checkpoint_dependencies)/(\w+?)(?:_\d{1,4})?", layer)
        if match is None:
            return
        kinds[match[1]] += 1
    depth = kinds["layer_normalization"] // 2
    blocks = [f"block{i}_" for i in range(depth)]
    each = {
        "patch_conv2d_with_resample_weights": ["stem_conv"],
        "class_token": ["cls_token"],
        "positional_embedding": ["positional_embedding"] * kinds["positional_embedding"],
        "layer_normalization": [*(b + part for b in blocks for part in ("attn_ln", "mlp_ln")), "out_ln"],
        "bias_layer": [b + part for b in blocks for part in ("attn_query_bias", "attn_value_bias")],
        "dense": [b + part for b in blocks for part in ("attn_qkv", "attn_output", "mlp_dense_1", "mlp_dense_2")],
        "channel_affine": [b + part for b in blocks for part in ("attn_gamma", "mlp_gamma")],
        "multi_head_relative_positional_embedding": [f"{b}attn_pos_emb" for b in blocks],
    }
    each["dense"] += ["predictions"] * (kinds["dense"] % 4)
    if kinds["multi_head_relative_positional_embedding"] == 1 < depth:
        each["multi_head_relative_positional_embedding"] = ["shared_pos_emb"]
    for kind in ("channel_affine", "multi_head_relative_positional_embedding"):
        each[kind] = each[kind] if kinds[kind] else []
    if kinds != Counter({kind: len(names) for kind, names in each.items() if names}):
        return
    container = next(iter(paths)).partition("/")[0]
    for kind, names in each.items():
        for i, name in enumerate(names):
            yield f"{container}/{kind}_{i}/vars" if i else f"{container}/{kind}/vars", name


_DEPTH = 20
"""Models within models whose layers are named."""
