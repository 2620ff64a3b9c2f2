"""The table of leaves is that of the models, and names the key of ``config.json`` that a size comes from."""

from dataclasses import replace

import pytest

from beit_jax.config import BeitConfig
from beit_jax.models.build import param_shapes
from beit_jax.variants import VARIANTS
from beit_jax.weights.leaves import leaves

TINY = BeitConfig(image_size=(32, 48), patch_size=(8, 16), hidden_size=24, num_hidden_layers=4, num_attention_heads=3,
                  intermediate_size=40)  # fmt: skip
SEGMENTER = replace(TINY, task="semantic_segmentation", labels=("a", "b"), out_indices=(0, 1, 2, 3))
MASKED = replace(TINY, task="masked_image_modeling", vocab_size=50)
OTHERS = {
    "absolute": replace(TINY, use_absolute_position_embeddings=True, layer_scale_init_value=0.0),
    "both tables": replace(TINY, position_bias="both", pooling="cls"),
    "norms within the branches": replace(TINY, use_key_bias=True, use_sub_norm=True, embedding_size=5),
    "no pooling": replace(TINY, add_pooling_layer=False),
    "no labels": replace(TINY, task="image_classification"),
    "cls classifier": replace(TINY, task="image_classification", labels=("a",), pooling="cls", num_channels=1),
    "aggregation with its own head": replace(MASKED, aggregate_from=1, aggregation_layers=1, own_aggregation_head=True),
    "aggregation": replace(MASKED, aggregate_from=2, aggregation_layers=2, position_bias="both", pooling="cls"),
    "heads for segmentation": replace(
        SEGMENTER, auxiliary_num_convs=3, auxiliary_concat_input=True, auxiliary_channels=7, pool_scales=(1, 4)
    ),
    "no auxiliary head": replace(SEGMENTER, use_auxiliary_head=False, use_mask_token=True),
    "backbone": replace(TINY, task="backbone", out_indices=(1, 3)),
    "backbone with pyramid": replace(TINY, task="backbone", out_indices=(0, 1, 2, 3), add_fpn=True),
}


@pytest.mark.parametrize("config", [*VARIANTS.values(), *OTHERS.values()], ids=[*VARIANTS, *OTHERS])
def test_leaves_are_those_of_the_model(config: BeitConfig) -> None:
    found = {name: tuple(side for side, _ in sides) for name, sides in leaves(config).items()}
    assert found == dict(param_shapes(config))
