"""The leaves of a model by its configuration, and which key of ``config.json`` each of their sizes comes from.

With them a native checkpoint's ``config.json`` is compared with the header of its weights, before a tensor is read.
`beit_jax.models` defines the same leaves by building them. This module needs no Flax, which takes a third of a second
to import, and it can name the key that is wrong. tests/weights compares both for every published model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from beit_jax.config import BeitConfig, Task
from beit_jax.errors import BeitJaxError, printable
from beit_jax.weights.sizes import check_sizes

Side = tuple[int, str]
"""A length of a leaf's axis, and the key that says it, "" if no key does."""
Sides = tuple[Side, ...]

_BATCH_NORM = ("bias", "mean", "scale", "var")
_STATISTICS = ("/mean", "/var")
_THREE = (3, "")


def leaves(config: BeitConfig) -> dict[str, Sides]:
    """The sides of every leaf by its flat name: ``param_shapes(config)``, with the keys that they come from."""
    return dict(_model(config))


def shapes(config: BeitConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf by its flat name, as `beit_jax.models.build.param_shapes` has it."""
    return {name: tuple(side for side, _ in sides) for name, sides in leaves(config).items()}


def num_params(config: BeitConfig) -> int:
    """The count of all numbers that training learns: the leaves, without running statistics of batch norm."""
    learned = (shape for name, shape in shapes(config).items() if not name.endswith(_STATISTICS))
    return sum(math.prod(shape) for shape in learned)


def check_config(config: BeitConfig, shapes: Mapping[str, tuple[int, ...]], config_file: Path, weights: Path) -> None:
    """Compares a configuration with the names and shapes of the tensors beside it.

    Raises:
        BeitJaxError: they describe another model; names both files, the key and the tensor.
    """
    if _parts(shapes) != _PARTS[config.task] - ({"classifier"} if not config.labels else set()):
        task_parts = " and ".join(sorted(_parts(shapes))) or "nothing"
        raise BeitJaxError(
            f"{printable(config_file)}: architectures: a model of the task {config.task}, but {weights.name} holds "
            f"{task_parts}; correct {config_file.name}, or use the one that was written with these weights"
        )
    check_sizes(config, shapes, str(config_file), str(weights))
    expected = leaves(config)
    # Tables of positions last: their grid comes from the size of the patches as well, which other leaves show alone.
    for name in sorted(expected.keys() & shapes.keys(), key=lambda name: (_is_grid(expected[name]), name)):
        sides, found = expected[name], shapes[name]
        if found == tuple(side for side, _ in sides):
            continue
        pairs = zip(sides, found, strict=False)
        key = next((key for (side, key), length in pairs if side != length), "architectures")
        raise _disagreement(config_file, weights, key, name, [side for side, _ in sides], list(found))
    for name in sorted(expected.keys() ^ shapes.keys()):
        want = [side for side, _ in expected[name]] if name in expected else None
        raise _disagreement(config_file, weights, _switch(name), name, want, None if want else list(shapes[name]))


_PARTS: Mapping[Task, set[str]] = {
    "features": {"embeddings"},
    "masked_image_modeling": {"beit", "lm_head"},
    "image_classification": {"beit", "classifier"},
    "semantic_segmentation": {"beit", "decode_head"},
    "backbone": {"beit"},
}
"""The first words of the names of leaves, by which the tasks differ."""


def _is_grid(sides: Sides) -> bool:
    return any(key == "image_size" for _, key in sides)


def _parts(names: Iterable[str]) -> set[str]:
    return {name.partition("/")[0] for name in names} & set().union(*_PARTS.values())


def _disagreement(
    config_file: Path, weights: Path, key: str, name: str, want: list[int] | None, found: list[int] | None
) -> BeitJaxError:
    return BeitJaxError(
        f"{printable(config_file)}: {key}: with it, {printable(name)} is {_shown(want)}, but {weights.name} holds "
        f"{_shown(found)}; correct {config_file.name}, or use the one that was written with these weights"
    )


def _shown(shape: list[int] | None) -> str:
    return "no tensor" if shape is None else f"a tensor {shape}"


def _switch(name: str) -> str:
    """The key that decides whether a leaf is there."""
    return next((key for part, key in _SWITCHES.items() if part in f"/{name}"), "architectures")


_SWITCHES: Mapping[str, str] = {
    "/aggregation/blocks/": "beit_jax.aggregation_layers",
    "/aggregation/": "beit_jax.own_aggregation_head",
    "/attention/bias_table": "use_relative_position_bias",
    "/attention/q_bias": "beit_jax.use_key_bias",
    "/attention/qkv_bias": "beit_jax.use_key_bias",
    "/attention/norm/": "beit_jax.use_sub_norm",
    "/mlp/norm/": "beit_jax.use_sub_norm",
    "/embedding_head/": "beit_jax.embedding_size",
    "/shared_bias_table": "use_shared_relative_position_bias",
    "/position_embeddings": "use_absolute_position_embeddings",
    "/mask_token": "use_mask_token",
    "/gamma_": "layer_scale_init_value",
    "/beit/norm/": "use_mean_pooling",
    "/beit/pooler_norm/": "use_mean_pooling",
    "/pooler_norm/": "beit_jax.add_pooling_layer",
    "/decode_head/pool_": "pool_scales",
    "/auxiliary_head/concat/": "auxiliary_concat_input",
    "/auxiliary_head/conv_": "auxiliary_num_convs",
    "/auxiliary_head/": "use_auxiliary_head",
    "/fpn/": "add_fpn",
}


# --- The tables -------------------------------------------------------------------------------------------------------


def _model(config: BeitConfig) -> Iterator[tuple[str, Sides]]:
    hidden, classes = _hidden(config), (config.num_labels, "id2label")
    if config.task == "features":
        yield from _encoder(config)
        return
    yield from _under("beit/", _encoder(config))
    if config.task == "masked_image_modeling":
        if config.aggregation_layers:
            depth = (config.aggregation_layers, "beit_jax.aggregation_layers")
            yield from _under("aggregation/blocks/", _blocks(config, depth))
        if config.own_aggregation_head:
            yield from _affine("aggregation/norm", hidden)
            yield from _linear("aggregation/lm_head", hidden, (config.vocab_size, "vocab_size"))
        yield from _affine("norm", hidden)
        yield from _linear("lm_head", hidden, (config.vocab_size, "vocab_size"))
    elif config.task == "image_classification" and config.labels:
        yield from _linear("classifier", hidden, classes)
    elif config.task == "semantic_segmentation" or config.add_fpn:
        yield from _under("fpn/", _pyramid(hidden))
    if config.task == "semantic_segmentation":
        yield from _under("decode_head/", _uper_head(config, classes))
        if config.use_auxiliary_head:
            yield from _under("auxiliary_head/", _fcn_head(config, classes))


def _under(parent: str, found: Iterator[tuple[str, Sides]]) -> Iterator[tuple[str, Sides]]:
    return ((parent + name, sides) for name, sides in found)


def _hidden(config: BeitConfig) -> Side:
    return config.hidden_size, "hidden_size"


def _affine(name: str, *sides: Side) -> Iterator[tuple[str, Sides]]:
    yield from ((f"{name}/{leaf}", sides) for leaf in ("bias", "scale"))


def _linear(name: str, inputs: Side, outputs: Side, *before: Side) -> Iterator[tuple[str, Sides]]:
    yield f"{name}/kernel", (*before, inputs, outputs)
    yield f"{name}/bias", (*before, outputs)


def _encoder(config: BeitConfig) -> Iterator[tuple[str, Sides]]:
    hidden, one = _hidden(config), (1, "")
    rows, columns = config.grid
    yield "embeddings/cls_token", (one, one, hidden)
    if config.use_mask_token:
        yield "embeddings/mask_token", (one, one, hidden)
    if config.use_absolute_position_embeddings:
        yield "embeddings/position_embeddings", (one, (1 + rows * columns, "image_size"), hidden)
    patch = tuple((side, "patch_size") for side in config.patch_size)
    yield "embeddings/patch_kernel", (*patch, (config.num_channels, "num_channels"), hidden)
    yield "embeddings/patch_bias", (hidden,)
    if config.has_shared_bias:
        yield "shared_bias_table", _bias_table(config)
    yield from _under("blocks/", _blocks(config, (config.num_hidden_layers, "num_hidden_layers")))
    if config.pooling == "cls":
        yield from _affine("norm", hidden)
    elif config.has_pooler:
        yield from _affine("pooler_norm", hidden)
    if config.embedding_size:
        yield "embedding_head/kernel", (hidden, (config.embedding_size, "beit_jax.embedding_size"))


def _bias_table(config: BeitConfig) -> Sides:
    rows, columns = config.grid
    offsets = (2 * rows - 1) * (2 * columns - 1) + 3  # three more concern the class token
    return (offsets, "image_size"), (config.num_attention_heads, "num_attention_heads")


def _blocks(config: BeitConfig, depth: Side) -> Iterator[tuple[str, Sides]]:
    hidden, inner = _hidden(config), (config.intermediate_size, "intermediate_size")
    heads = (config.num_attention_heads, "num_attention_heads"), (config.head_dim, "num_attention_heads")
    yield from _affine("norm1", depth, hidden)
    yield "attention/qkv_kernel", (depth, hidden, _THREE, *heads)
    if config.use_key_bias:
        yield "attention/qkv_bias", (depth, _THREE, *heads)
    else:
        yield "attention/q_bias", (depth, *heads)
        yield "attention/v_bias", (depth, *heads)
    yield "attention/out_kernel", (depth, *heads, hidden)
    yield "attention/out_bias", (depth, hidden)
    if config.has_layer_bias:
        yield "attention/bias_table", (depth, *_bias_table(config))
    yield from _affine("norm2", depth, hidden)
    yield from _linear("mlp/fc1", hidden, inner, depth)
    yield from _linear("mlp/fc2", inner, hidden, depth)
    if config.use_sub_norm:
        yield from _affine("attention/norm", depth, hidden)
        yield from _affine("mlp/norm", depth, inner)
    if config.layer_scale_init_value > 0:
        yield "gamma_1", (depth, hidden)
        yield "gamma_2", (depth, hidden)


def _batch_norm(name: str, features: Side) -> Iterator[tuple[str, Sides]]:
    yield from ((f"{name}/{leaf}", (features,)) for leaf in _BATCH_NORM)


def _conv_norm(name: str, inputs: Side, outputs: Side, side: int) -> Iterator[tuple[str, Sides]]:
    yield f"{name}/kernel", ((side, ""), (side, ""), inputs, outputs)
    yield from _batch_norm(f"{name}/norm", outputs)


def _pyramid(hidden: Side) -> Iterator[tuple[str, Sides]]:
    for name in ("up4_first", "up4_second", "up2"):
        yield f"{name}/kernel", ((2, ""), (2, ""), hidden, hidden)
        yield f"{name}/bias", (hidden,)
    yield from _batch_norm("up4_norm", hidden)


def _uper_head(config: BeitConfig, classes: Side) -> Iterator[tuple[str, Sides]]:
    hidden = _hidden(config)
    for i in range(len(config.pool_scales)):
        yield from _conv_norm(f"pool_{i}", hidden, hidden, 1)
    yield from _conv_norm("bottleneck", ((1 + len(config.pool_scales)) * config.hidden_size, "pool_scales"), hidden, 3)
    for i in range(3):
        yield from _conv_norm(f"lateral_{i}", hidden, hidden, 1)
        yield from _conv_norm(f"smooth_{i}", hidden, hidden, 3)
    yield from _conv_norm("fuse", (4 * config.hidden_size, "hidden_size"), hidden, 3)
    yield from _pixel_classifier(hidden, classes)


def _fcn_head(config: BeitConfig, classes: Side) -> Iterator[tuple[str, Sides]]:
    hidden, width = _hidden(config), (config.auxiliary_channels, "auxiliary_channels")
    for i in range(config.auxiliary_num_convs):
        yield from _conv_norm(f"conv_{i}", width if i else hidden, width, 3)
    if config.auxiliary_concat_input:
        both = (config.hidden_size + config.auxiliary_channels, "auxiliary_channels")
        yield from _conv_norm("concat", both, width, 3)
    yield from _pixel_classifier(width, classes)


def _pixel_classifier(inputs: Side, classes: Side) -> Iterator[tuple[str, Sides]]:
    yield "classifier/kernel", ((1, ""), (1, ""), inputs, classes)
    yield "classifier/bias", (classes,)
