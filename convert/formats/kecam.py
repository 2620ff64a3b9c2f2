"""keras_cv_attention_models' BEiT, by Keras 2's names of variables and by Keras 3's numbers.

Kernels lie [in, out] as in Flax, bias tables [heads, positions]. Where the model's configuration lies beside the
weights (``.keras``, and ``.h5`` of a whole model), it says what no shape tells.
Source: keras_cv_attention_models 1.4.3 beit/beit.py, beit/eva.py, beit/vit.py.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from beit_jax.choices import Activation
from beit_jax.errors import BeitJaxError, printable

from ..files.keras_names import layers_of, settings_of
from . import unilm
from .format import Description, Sighting, SourceFormat, describe_by_config
from .heads import Size, Statement
from .rules import FLAT, FLAX_HEADS, FLAX_ONE_QKV, LINEAR, Rule, Rules, rule

if TYPE_CHECKING:
    from ..files.weight_file import TensorInfo

_B = "block{i}_"


def _layer(theirs: str, flax: str, *leaves: str) -> Rules:
    """Rules of a layer whose leaves are named in Keras and here: ``gamma=scale``."""
    pairs = [leaf.split("=") for leaf in leaves]
    return tuple(rule(f"{theirs}/{keras}:0", f"{flax}/{ours}") for keras, ours in pairs)


_NORM, _DENSE = ("gamma=scale", "beta=bias"), ("kernel=kernel", "bias=bias")
BACKBONE: Rules = (
    rule("cls_token/tokens:0", "embeddings/cls_token"),
    rule("mask_token/weight:0", "embeddings/mask_token"),
    rule("positional_embedding/positional_embedding:0", "embeddings/position_embeddings"),
    rule("stem_conv/kernel:0", "embeddings/patch_kernel"),
    rule("stem_conv/bias:0", "embeddings/patch_bias"),
    rule("shared_pos_emb/positional_embedding:0", "shared_bias_table", LINEAR),
    *_layer(_B + "attn_ln", "blocks/norm1", *_NORM),
    rule(_B + "attn_qkv/kernel:0", "blocks/attention/qkv_kernel", FLAX_ONE_QKV),
    rule(_B + "attn_qkv/bias:0", "blocks/attention/qkv_bias", FLAT),
    rule(_B + "attn_query_bias/bias:0", "blocks/attention/q_bias", FLAT),
    rule(_B + "attn_value_bias/bias:0", "blocks/attention/v_bias", FLAT),
    rule(_B + "attn_pos_emb/positional_embedding:0", "blocks/attention/bias_table", LINEAR),
    rule(_B + "attn_output/kernel:0", "blocks/attention/out_kernel", FLAX_HEADS),
    rule(_B + "attn_output/bias:0", "blocks/attention/out_bias"),
    rule(_B + "attn_gamma/weight:0", "blocks/gamma_1"),
    *_layer(_B + "mlp_ln", "blocks/norm2", *_NORM),
    *_layer(_B + "mlp_dense_1", "blocks/mlp/fc1", *_DENSE),
    *_layer(_B + "mlp_dense_2", "blocks/mlp/fc2", *_DENSE),
    rule(_B + "mlp_gamma/weight:0", "blocks/gamma_2"),
    *_layer("out_ln", "pooler_norm", *_NORM),
    *_layer("out_ln", "norm", *_NORM),
)
HEADS: Rules = (*_layer("out_ln", "norm", *_NORM), *_layer("predictions", "classifier", *_DENSE))

# The place of a variable among those of its layer; a layer that adds a bias alone has no other.
_PLACES = {"kernel": 0, "gamma": 0, "tokens": 0, "weight": 0, "positional_embedding": 0, "bias": 1, "beta": 1}


def _numbered(found: Rule) -> Rule:
    layer, _, leaf = found.torch[0].removesuffix(":0").rpartition("/")
    place = 0 if layer.endswith(("query_bias", "value_bias")) else _PLACES[leaf]
    return replace(found, torch=(f"{layer}/vars/{place}",))


# The original's name of every leaf, by which its page describes a model. The norm at the end stands for either.
_ORIGINAL: Mapping[str, str] = {each.flax: each.torch[0] for each in (*unilm.BACKBONE, *unilm.HEADS)}
_KEY_BIAS = "blocks.{i}.attn.qkv.bias"


def _as_torch(rules: Rules, tensors: Mapping[str, "TensorInfo"]) -> dict[str, "TensorInfo"]:
    """The tensors under the original's names, with the shapes that they have in torch."""
    found: dict[str, TensorInfo] = {}
    for each in rules:
        pattern = re.compile(re.escape(each.torch[0]).replace(r"\{i\}", r"(\d{1,6})"))
        original = _ORIGINAL.get(each.flax, _KEY_BIAS)
        for name, info in tensors.items():
            if match := pattern.fullmatch(name):
                shape = info.shape
                turned = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1] if len(shape) == 2 else shape
                found[original.replace("{i}", match[1] if match.groups() else "")] = replace(info, shape=turned)
    return found


# Layers of the library's other models, by which a file is refused: nothing here computes them.
_RELATIVES = {
    r"block0_mlp_dense_gate/": "a gated MLP, as in EVA-02 and DINOv2",
    r"block0_mlp_scale_ln/": "a norm within the MLP, as in EVA-02",
    r"reg_token/": "register tokens, as in ViT-5",
    r"block0_attn_[qk]_rmsnorm/": "norms of queries and keys, as in ViT-5",
    r"pre_ln/": "a norm before the first block, as in MetaTransformer",
    r"patch_merging": "patches merged between blocks",
    r"mask_token/": "its pre-training model, whose head has no norm before it",
}


# And those that have no weights, or those of BEiT's layers: only the configuration tells them.
_OTHER_LAYERS = {
    "PositionalEncodingFourierRot": "rotary positions, as in EVA-02",
    "RMSNorm": "norms without mean, as in ViT-5",
}


class _Graph:
    """The layers of a model's configuration, by name, and what each reads."""

    def __init__(self, model: Any) -> None:
        self.layers: dict[str, Mapping[str, Any]] = {}
        waiting = [model] if isinstance(model, Mapping) else []
        while waiting and len(self.layers) < 20_000:
            for layer in layers_of(waiting.pop()):
                self.layers[str(layer.get("name") or self.name(layer))] = layer
                waiting.append(layer)

    def name(self, layer: Mapping[str, Any]) -> object:
        return settings_of(layer).get("name")

    def setting(self, layer: str, key: str) -> Any:
        return settings_of(self.layers.get(layer, {})).get(key)

    def read_by(self, layer: str) -> str:
        """The name of the first layer that `layer` reads; "" where that is not told."""
        return next(_histories(self.layers.get(layer, {}).get("inbound_nodes"), 0), "")

    def reader(self, layer: str) -> str:
        """The name of the first layer that reads `layer`; "" where that is not told."""
        return next((name for name in self.layers if self.read_by(name) == layer), "")

    def kind(self, layer: str) -> str:
        """The class of a layer, or the function that it calls."""
        found = self.layers.get(layer, {})
        return f"{found.get('class_name', '')} {settings_of(found).get('function', '')}".strip()


def _histories(nodes: Any, depth: int) -> Iterator[str]:
    """The names of layers in inbound_nodes: ``[name, node, tensor, ...]`` in Keras 2, keras_history in Keras 3."""
    if isinstance(nodes, list) and nodes and isinstance(nodes[0], str):
        yield nodes[0]
    elif depth < 10:
        inner = nodes.values() if isinstance(nodes, Mapping) else nodes if isinstance(nodes, list) else ()
        for each in inner:
            yield from _histories(each, depth + 1)


def _describe(sighting: Sighting) -> Description:
    tensors, file = sighting.tensors, sighting.file
    for pattern, what in _RELATIVES.items():
        if found := next((name for name in tensors if re.match(pattern, name)), None):
            raise BeitJaxError(f"{file}: {printable(found)}: {what}: a relative of BEiT, which nothing here computes")
    content = sighting.content
    if content is not None and "class_name" not in content:  # transformers' configuration, and not Keras' of its model
        return describe_by_config(sighting)
    graph = _Graph(content if content is not None else sighting.metadata.get("model_config"))
    original = _as_torch((*sighting.format.backbone, *sighting.format.heads), tensors)
    key_bias = _KEY_BIAS.replace("{i}", "0") in original
    if found := next((kind for name in graph.layers if (kind := graph.kind(name)) in _OTHER_LAYERS), None):
        raise BeitJaxError(f"{file}: {found}: {_OTHER_LAYERS[found]}: a relative of BEiT, which nothing here computes")
    size = _image_size(graph, bool(_tables(original)), file)
    _check_positions(original, size, file)
    mean = _pools_mean(graph, key_bias, original, file)
    for gone in ("norm" if mean else "fc_norm",):
        original = {name: info for name, info in original.items() if not name.startswith(f"{gone}.")}
    without = {name: info for name, info in original.items() if not re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name)}
    described = unilm.describe_by_tensors(
        replace(sighting, format=unilm.UNILM, tensors=without, prefix=""),
        heads=lambda known: _heads(graph, known),
        image_sizes=size,
    )
    config = replace(
        described.config,
        use_key_bias=key_bias,
        layer_norm_eps=_epsilon(graph, file),
        hidden_act=_activation(graph, file),
    )
    seen = [f"{sighting.format.name}: names and shapes of the tensors", *described.seen[1:]]
    seen.append("its model's configuration lies beside the weights" if graph.layers else _ASSUMED)
    if config.task == "image_classification":
        config, last = _outputs(config, graph)
        seen += [f"its model ends with a {last}, which is no part of the weights: logits are computed here"] * bool(
            last
        )
    return replace(described, config=config, seen=tuple(seen))


_ASSUMED = (
    "nothing in the file says pooling, activation and epsilon: the mean, gelu and 1e-6 as in the library's own BEiT; "
    ".keras and .h5 of model.save say them"
)


def _tables(original: Mapping[str, "TensorInfo"]) -> set[str]:
    return {name.partition(".")[0] for name in original if name.endswith("relative_position_bias_table")}


def _check_positions(original: Mapping[str, "TensorInfo"], size: list[tuple[int, int]], file: str) -> None:
    if "cls_token" not in original:
        raise BeitJaxError(f"{file}: no cls_token: a relative of BEiT without class token, which nothing here computes")
    head, width = original.get("head.weight"), original["cls_token"].shape[-1]
    if head is not None and head.shape[1:] == (2 * width,):
        raise BeitJaxError(
            f"{file}: predictions read {2 * width} numbers, the class token and the mean as in DINOv2: a relative of "
            "BEiT, which nothing here computes"
        )
    rows = original["pos_embed"].shape[1] if "pos_embed" in original else 2
    kernel = original.get("patch_embed.proj.weight")
    sides = kernel.shape[2:] if kernel is not None and len(kernel.shape) == 4 and 0 not in kernel.shape else (1, 1)
    patches = {height // sides[0] * (width // sides[1]) for height, width in size}
    if rows in patches or (not patches and (rows**0.5).is_integer() and not ((rows - 1) ** 0.5).is_integer()):
        raise BeitJaxError(
            f"{file}: positional_embedding has {rows} rows and none for the class token, as in FlexiViT: a relative of "
            "BEiT, which nothing here computes"
        )


def _pools_mean(graph: _Graph, key_bias: bool, original: Mapping[str, "TensorInfo"], file: str) -> bool:
    """True where the norm at the end, out_ln, is that of the mean patch; False where it is that of every token."""
    if "out_ln" in graph.layers:
        return "mean" in f"{graph.kind(graph.read_by('out_ln'))} {graph.read_by('out_ln')}".lower()
    if key_bias:
        raise BeitJaxError(
            f"{file}: nothing says whether its model pools the mean of the patches, as EVA-L, or the class token, as "
            "ViT: convert what model.save('NEW.keras') or model.save('NEW.h5') writes, which keeps the model beside "
            "the weights"
        )
    return True


def _image_size(graph: _Graph, has_table: bool, file: str) -> list[tuple[int, int]]:
    """Pixels, (height, width), of the model's input; nothing where it is not told."""
    source = graph.read_by("stem_conv")
    shape = graph.setting(source, "batch_input_shape") or graph.setting(source, "batch_shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(side) is int for side in shape[1:3]):
        return []
    if shape[1] != shape[2] and has_table:
        raise BeitJaxError(
            f"{file}: its model is of {shape[1]}x{shape[2]} pixels; keras_cv_attention_models counts the position "
            "biases of a grid that is not square in an order of its own, which nothing here computes: build it there "
            "for square images with the same weights, and save that"
        )
    return [(shape[1], shape[2])]


def _heads(graph: _Graph, size: Size) -> list[Statement]:
    """What the split of queries into heads says: a Reshape to [-1, heads, channels of a head]."""
    targets = [graph.setting(name, "target_shape") for name in graph.layers if graph.kind(name) == "Reshape"]
    splits = {each[1] for each in targets if isinstance(each, list) and len(each) == 3 and type(each[1]) is int}
    return [Statement(heads, "the model's configuration") for heads in sorted(splits)]


def _epsilon(graph: _Graph, file: str) -> float:
    """The epsilon of all norms."""
    norms = [name for name in graph.layers if graph.kind(name) == "LayerNormalization"]
    stated = {graph.setting(name, "epsilon") for name in norms}
    if len(stated) > 1 or not all(isinstance(each, int | float) for each in stated):
        raise BeitJaxError(
            f"{file}: its norms have epsilons {printable(sorted(map(str, stated)))}; expected one of all"
        )
    return float(stated.pop()) if stated else 1e-6


def _activation(graph: _Graph, file: str) -> Activation:
    """The activation of the MLP."""
    layer = graph.reader("block0_mlp_dense_1")
    if not layer:
        return "gelu"
    stated = graph.setting(layer, "activation")
    found: Any = "silu" if stated == "swish" else stated
    if graph.kind(layer) != "Activation" or found not in get_args(Activation):
        raise BeitJaxError(
            f"{file}: the activation of its MLP is {printable(found or graph.kind(layer))}; expected one of "
            f"{', '.join(get_args(Activation))}: nothing here computes another"
        )
    known: Activation = found
    return known


def _outputs(config: Any, graph: _Graph) -> tuple[Any, str]:
    """The configuration with what the outputs are, and the function that the model ends with."""
    last = graph.setting("predictions", "activation") if graph.layers else "softmax"
    if last == "sigmoid":
        return replace(config, problem_type="multi_label_classification"), last
    return config, "" if last in (None, "linear") else printable(last, 40)


KECAM = SourceFormat(
    name="keras_cv_attention_models",
    backbone=BACKBONE,
    heads=HEADS,
    marker="block0_attn_qkv/kernel:0",
    prefixes=("",),
    describe=_describe,
)
KECAM_NUMBERED = replace(
    KECAM,
    name="keras_cv_attention_models, numbered variables",
    backbone=tuple(map(_numbered, BACKBONE)),
    heads=tuple(map(_numbered, HEADS)),
    marker="block0_attn_qkv/vars/0",
)

FORMATS = (KECAM, KECAM_NUMBERED)
