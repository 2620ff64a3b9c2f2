"""The number of attention heads: what is believed, in which order, and what a name says."""

from typing import Any

import pytest

from beit_jax.convert.formats.heads import (
    BASE,
    GIANT,
    LARGE,
    PUBLISHED,
    THIN,
    Size,
    Statement,
    settle,
    stated_by_architecture,
    stated_in_training,
)
from beit_jax.errors import BeitJaxError
from beit_jax.variants import VARIANTS


def test_published_sizes_are_those_of_the_variants() -> None:
    found = {
        (Size(config.hidden_size, config.num_hidden_layers, config.intermediate_size), config.num_attention_heads)
        for config in VARIANTS.values()
    }
    assert found == {(BASE, 12), (LARGE, 16)} <= PUBLISHED.items()
    assert GIANT.width // PUBLISHED[GIANT] == 88 and THIN.width // PUBLISHED[THIN] == 34


@pytest.mark.parametrize(("size", "heads"), [(BASE, 12), (LARGE, 16), (GIANT, 16), (THIN, 16)])
def test_a_published_size_counts_where_nothing_is_stated(size: Size, heads: int) -> None:
    found = settle(size, [], [], "file")
    assert found.heads == heads and f"width {size.width}" in found.where
    assert settle(size, [Statement(8, "--num-heads")], [], "file").heads == 8


@pytest.mark.parametrize("size", [Size(768, 11, 3072), Size(768, 12, 3071), Size(1408, 24, 6144), Size(128, 2, 512)])
def test_another_size_is_refused(size: Size) -> None:
    with pytest.raises(BeitJaxError, match=rf"file: .*width {size.width}, depth {size.depth}.*--num-heads"):
        settle(size, [], [], "file")


def test_what_is_certain_goes_before_hints() -> None:
    assert settle(BASE, [Statement(8, "config.json")], [Statement(6, "args")], "file").where == "config.json"
    assert settle(BASE, [], [Statement(6, "args")], "file").heads == 6


@pytest.mark.parametrize(
    ("name", "arguments", "size", "heads"),
    [
        ("beit_base_patch16_224", {}, BASE, 12),
        ("beit_base_patch16_224.in22k_ft_in22k_in1k", {}, BASE, 12),
        ("hf_hub:timm/beitv2_large_patch16_224.in1k_ft_in1k", {}, LARGE, 16),
        ("beit_large_patch16_224_8k_vocab_cls_pt", {}, LARGE, 16),
        ("dit_base_patch16_224", {}, BASE, 12),
        ("eva_giant_patch14_clip_224", {}, GIANT, 16),
        ("eva_g_patch14", {}, GIANT, 16),
        ("beit_24x544_patch16_224", {}, THIN, 16),
        ("beit_base_patch16_224", {"depth": 2}, Size(768, 2, 3072), 12),
        ("beit_base_patch16_224", {"embed_dim": 96, "depth": 2}, Size(96, 2, 384), 12),
        ("beit_base_patch16_224", {"num_heads": 6}, Size(96, 2, 384), 6),
        ("beit_base_patch16_224", {}, Size(96, 2, 384), None),
        ("beit_base_patch16_224", {"num_heads": None}, Size(96, 2, 384), None),
        ("beit_base_patch16_224", {"num_heads": 6.0}, Size(96, 2, 384), 6),
        ("vit_base_patch16_224", {}, BASE, 12),
        ("deit3_medium_patch16_224", {}, Size(512, 12, 2048), 8),
        ("flexivit_small", {}, Size(384, 12, 1536), 6),
        ("swin_base_patch4_window7_224", {}, BASE, None),
        ("beit_base", {}, BASE, None),
        (None, {}, BASE, None),
        ({"a": 1}, {}, BASE, None),
    ],
)
def test_names_of_architectures(name: object, arguments: dict[str, Any], size: Size, heads: int | None) -> None:
    assert [found.heads for found in stated_by_architecture(name, arguments, size, "")] == [heads] * (heads is not None)


@pytest.mark.parametrize("heads", [True, 10**400, [12], "twelve", 12.5, {}])
def test_a_number_that_cannot_be_read_is_not_passed_over(heads: object) -> None:
    """timm would build another model than the architecture's, or none."""
    with pytest.raises(BeitJaxError, match=r"args\.num_heads: expected the number of attention heads, found"):
        stated_by_architecture("beit_base_patch16_224", {"num_heads": heads}, BASE, "args.")


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"args": {"num_heads": 3}}, [(3, "args.num_heads")]),
        ({"num_attention_heads": "3"}, [(3, "num_attention_heads")]),
        ({"args": {"model": "beit_base_patch16_224"}}, [(12, "the architecture beit_base_patch16_224")]),
        ({"arch": "beit_base_patch16_224", "args": {"num_heads": 3}}, [(3, "args.num_heads")]),
        ({"args": {"model": "beit_base_patch16_224", "kw": {"num_heads": 3}}}, [(3, "args.kw.num_heads")]),
        ({"args": {"decoder": {"num_heads": 3}, "teacher": {"num_heads": 4}}}, []),
        ({"args": {"model": ["beit_base_patch16_224"], "num_heads": [3]}}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_settings_of_a_training(metadata: dict[str, Any], found: list[tuple[int, str]]) -> None:
    assert [(each.heads, each.where) for each in stated_in_training(metadata, BASE)] == found
