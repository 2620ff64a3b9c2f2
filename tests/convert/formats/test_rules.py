"""The operations and the tables: invertible, total, and unambiguous for every model."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from beit_jax.config import BeitConfig
from beit_jax.convert.formats import FORMATS
from beit_jax.convert.formats.rules import (
    CONV,
    CONV_TRANSPOSE,
    FLAT,
    FUSED_QKV,
    KEEP,
    LINEAR,
    QKV,
    Op,
    Rule,
    export,
    steps,
)
from beit_jax.convert.formats.writing import write_safetensors
from beit_jax.convert.identify import recognise
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import param_shapes
from beit_jax.variants import VARIANTS

sides = st.integers(1, 300)
OPS = {
    "keep": (KEEP, (7, 5)),
    "flat": (FLAT, (3, 4)),
    "linear": (LINEAR, (6, 5)),
    "linear of heads": (LINEAR, (3, 4, 5)),
    "conv": (CONV, (2, 3, 4, 5)),
    "transposed conv": (CONV_TRANSPOSE, (2, 3, 4, 5)),
    "qkv": (QKV, (6, 3, 2, 4)),
    "fused qkv": (FUSED_QKV, (6, 3, 2, 4)),
}


@pytest.mark.parametrize(("op", "shape"), OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_load_inverts_dump_row_by_row(op: Op, shape: tuple[int, ...], dtype: type) -> None:
    leaf = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    parts = [np.ascontiguousarray(part) for part in op.dump(leaf)]
    assert [part.shape for part in parts] == op.torch_shapes(shape)
    for size in (1, 2, len(leaf)):
        loaded = np.zeros_like(leaf)
        for start in range(0, len(leaf), size):
            op.load(parts, start, loaded[start : start + size])
        assert np.array_equal(loaded, leaf)


@given(sides, sides)
def test_linear_is_the_transpose_at_every_size(rows: int, columns: int) -> None:
    """Across the edges of the tiles it is computed in."""
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    leaf = np.empty((columns, rows), np.float32)
    LINEAR.load([weight], 0, leaf)
    assert np.array_equal(leaf, weight.T)


def test_qkv_by_hand() -> None:
    """Two heads of two channels over one input feature: torch rows are head-major."""
    query, key, value = (np.arange(4.0).reshape(4, 1) + base for base in (0, 10, 20))
    leaf = np.empty((1, 3, 2, 2))
    QKV.load([query, key, value], 0, leaf)
    assert leaf.tolist() == [[[[0, 1], [2, 3]], [[10, 11], [12, 13]], [[20, 21], [22, 23]]]]


def test_fused_qkv_is_the_three_parts_one_below_the_other() -> None:
    leaf = np.random.default_rng(0).standard_normal((6, 3, 2, 4))
    assert np.array_equal(FUSED_QKV.dump(leaf)[0], np.concatenate(QKV.dump(leaf)))


def test_transposed_conv_by_hand() -> None:
    weight = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # in, out, height, width
    leaf = np.empty((4, 5, 2, 3), weight.dtype)
    CONV_TRANSPOSE.load([weight], 0, leaf)
    assert leaf[1, 2, 0, 1] == weight[0, 1, 1, 2]


def test_conv_by_hand() -> None:
    weight = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # out, in, height, width
    leaf = np.empty((4, 5, 3, 2), weight.dtype)
    CONV.load([weight], 0, leaf)
    assert leaf[1, 2, 0, 1] == weight[1, 0, 1, 2]


TASKS = {
    "mmseg": "semantic_segmentation",
    "mmsegmentation 1.x": "semantic_segmentation",
    "mmpretrain BEiT v2": "masked_image_modeling",
}
_VIT = {
    "use_key_bias": True,
    "position_bias": "none",
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.0,
}
RELATIVES: Mapping[str, Mapping[str, Any]] = {
    "BEiT-3 (torchscale)": _VIT | {"use_sub_norm": True},
    "ViT, DeiT, MAE, DINO, EVA-L (timm and the originals)": _VIT,
    "ViT without a position of the class token (timm, DeiT III)": _VIT,
}
"""What models of a page have that BEiT's variants have not."""


@pytest.mark.parametrize("naming", FORMATS, ids=lambda naming: naming.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_leaf_of_every_variant_has_one_rule(naming, variant: str) -> None:  # type: ignore[no-untyped-def]
    config = replace(VARIANTS[variant], **RELATIVES.get(naming.name, {}))
    if naming.name in RELATIVES and config.task != "image_classification":
        pytest.skip("it has classifiers and features only")
    if naming.name.startswith("keras_cv_attention_models") and (
        config.task != "image_classification" or config.position_bias != "per_layer" or config.use_mask_token
    ):
        pytest.skip("it has fine-tuned classifiers only")
    if naming.name == "PaddleClas BEiTv2":
        pytest.skip("it has fine-tuned classifiers only, whose one bias fills two leaves")
    if config.task != TASKS.get(naming.name, config.task):
        pytest.skip("a page of one task")
    shapes = param_shapes(config)
    for prefix in naming.prefixes:
        planned = steps([rule for rule in naming.rules(config, prefix) if rule.flax in shapes], shapes)
        names = [name for step in planned.values() for name, _ in step.torch_shapes()]
        assert planned.keys() == shapes.keys()
        assert len(names) == len(set(names)), "two leaves read one tensor"


def test_every_rule_serves_some_model() -> None:
    leaves: set[str] = set()
    for bias, pooling, task in product(
        ("both",), ("mean", "cls"), ("features", "masked_image_modeling", "image_classification")
    ):
        config = BeitConfig(
            task=task, position_bias=bias, pooling=pooling, use_mask_token=True, use_absolute_position_embeddings=True,
            labels=("a",),
        )  # fmt: skip
        leaves |= param_shapes(config).keys()
        if task == "masked_image_modeling":
            aggregating = replace(config, aggregate_from=3, aggregation_layers=2, own_aggregation_head=True)
            leaves |= param_shapes(aggregating).keys()
    relative = BeitConfig(task="features", pooling="mean", use_key_bias=True, use_sub_norm=True, embedding_size=5)
    leaves |= param_shapes(relative).keys()
    for naming in FORMATS:
        for rule in (*naming.backbone, *naming.pooled, *naming.heads):
            assert rule.flax in leaves, rule


def test_every_segmentation_rule_serves_some_model() -> None:
    config = replace(
        VARIANTS["beit_base_patch16_640_ade20k"], auxiliary_num_convs=2, auxiliary_concat_input=True, pool_scales=(1, 5)
    )
    heads = ("fpn/", "decode_head/", "auxiliary_head/")
    leaves = {name for name in param_shapes(config) if name.startswith(heads)}
    for naming in FORMATS:
        rules = (*naming.segmentation.pyramid_rules(), *naming.segmentation.head_rules(config))
        assert {rule.flax for rule in rules} == leaves and len(rules) == len(leaves)


def test_a_leaf_without_a_rule_is_named() -> None:
    with pytest.raises(BeitJaxError, match=r"^other: expected one rule in the table, found 0"):
        steps([Rule(("a",), "leaf")], {"leaf": (1,), "other": (2,)})
    with pytest.raises(BeitJaxError, match=r"^leaf: expected one rule in the table, found 2"):
        steps([Rule(("a",), "leaf"), Rule(("b",), "leaf")], {"leaf": (1,)})


def test_export_is_contiguous_and_stacked_by_layer() -> None:
    leaf = np.arange(12.0).reshape(2, 3, 2)
    tensors = export([Rule(("layer.{i}.weight",), "blocks/kernel", LINEAR)], {"blocks/kernel": leaf})
    assert sorted(tensors) == ["layer.0.weight", "layer.1.weight"]
    assert tensors["layer.1.weight"].tolist() == leaf[1].T.tolist()
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_the_bytes_of_an_export_follow_from_its_tensors(tmp_path: Path) -> None:
    """The library that writes the file gives its metadata another order in every call."""
    tensors = {"b": np.arange(3, dtype=np.float32), "é": np.zeros((0, 2), np.float16)}
    for i in range(10):
        write_safetensors(tmp_path / f"{i}.safetensors", tensors)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    found = load_file(tmp_path / "0.safetensors")
    assert {name: leaf.tolist() for name, leaf in found.items()} == {"b": [0, 1, 2], "é": []}


def test_unknown_names_are_shown() -> None:
    with pytest.raises(
        BeitJaxError, match=r"^model.bin: no BEiT names .* among those of its 2 tensors: evil\\x1b\[0m, x, "
    ):
        recognise({"x", "evil\x1b[0m"}, FORMATS, "model.bin")
