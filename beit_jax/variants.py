"""The configurations of the published models, one row each."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from beit_jax.config import BeitConfig

_BASE = BeitConfig(position_bias="per_layer", task="image_classification", position_resize="geometric")
_LARGE = replace(
    _BASE,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    layer_scale_init_value=1e-5,
)


def _pretrained(base: BeitConfig) -> BeitConfig:
    return replace(base, task="masked_image_modeling", position_bias="shared", use_mask_token=True)


def _absolute(base: BeitConfig) -> BeitConfig:
    """DiT and the 1k model of 800 epochs: absolute positions instead of position bias."""
    return replace(base, position_bias="none", use_absolute_position_embeddings=True)


def _data2vec(base: BeitConfig) -> BeitConfig:
    return replace(base, model_type="data2vec-vision", add_pooling_layer=False, layer_scale_init_value=1e-4)


def _classes(base: BeitConfig, count: int, size: int = 224) -> BeitConfig:
    return replace(base, labels=tuple(f"LABEL_{i}" for i in range(count)), image_size=(size, size))


def _features(base: BeitConfig) -> BeitConfig:
    """data2vec's encoder as published by facebook/data2vec-vision-*: shared table, class token, final norm, no head."""
    return replace(base, task="features", position_bias="shared", pooling="cls")


def _segments(base: BeitConfig, out_indices: tuple[int, ...]) -> BeitConfig:
    """UperNet for the 150 classes of ADE20K at 640 pixels."""
    return replace(_classes(base, 150, 640), task="semantic_segmentation", out_indices=out_indices)


VARIANTS: Mapping[str, BeitConfig] = MappingProxyType(
    {
        # microsoft/unilm@768a3c8 beit/README.md and beit/modeling_{pretrain,finetune}.py
        "beit_base_patch16_224_pt22k": _pretrained(_BASE),
        "beit_large_patch16_224_pt22k": _pretrained(_LARGE),
        "beit_base_patch16_224_pt22k_ft22k": _classes(_BASE, 21841),
        "beit_large_patch16_224_pt22k_ft22k": _classes(_LARGE, 21841),
        "beit_base_patch16_224": _classes(_BASE, 1000),
        "beit_base_patch16_384": _classes(_BASE, 1000, 384),
        "beit_large_patch16_224": _classes(_LARGE, 1000),
        "beit_large_patch16_384": _classes(_LARGE, 1000, 384),
        "beit_large_patch16_512": _classes(_LARGE, 1000, 512),
        "beit_base_patch16_224_pt1k_800ep": replace(_absolute(_pretrained(_BASE)), layer_scale_init_value=0.0),
        # microsoft/unilm@768a3c8 beit/semantic_segmentation
        "beit_base_patch16_640_ade20k": _segments(_BASE, (3, 5, 7, 11)),
        "beit_large_patch16_640_ade20k": replace(_segments(_LARGE, (7, 11, 15, 23)), layer_scale_init_value=1e-6),
        # facebookresearch/data2vec_vision@af9a363 beit/README.md; the Hugging Face releases
        "data2vec_vision_base": _features(_data2vec(_BASE)),
        "data2vec_vision_large": _features(_data2vec(_LARGE)),
        "data2vec_vision_base_ft1k": _classes(_data2vec(_BASE), 1000),
        "data2vec_vision_large_ft1k": _classes(_data2vec(_LARGE), 1000),
        # microsoft/unilm@768a3c8 dit/README.md
        "dit_base": _absolute(_pretrained(_BASE)),
        "dit_large": _absolute(_pretrained(_LARGE)),
        "dit_base_finetuned_rvlcdip": _classes(_absolute(_BASE), 16),
        "dit_large_finetuned_rvlcdip": _classes(_absolute(_LARGE), 16),
    }
)

PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "beit_base_patch16_224_pt22k": 91_965_776,
        "beit_large_patch16_224_pt22k": 311_534_016,
        "beit_base_patch16_224_pt22k_ft22k": 102_557_713,
        "beit_large_patch16_224_pt22k_ft22k": 325_792_593,
        "beit_base_patch16_224": 86_530_984,
        "beit_base_patch16_384": 86_744_104,
        "beit_large_patch16_224": 304_430_568,
        "beit_large_patch16_384": 304_998_888,
        "beit_large_patch16_512": 305_674_728,
        "beit_base_patch16_224_pt1k_800ep": 92_089_856,
        "beit_base_patch16_640_ade20k": 163_407_980,
        "beit_large_patch16_640_ade20k": 441_271_084,
        "data2vec_vision_base": 85_665_360,
        "data2vec_vision_large": 303_136_192,
        "data2vec_vision_base_ft1k": 86_530_984,
        "data2vec_vision_large_ft1k": 304_430_568,
        "dit_base": 92_108_288,
        "dit_large": 311_724_032,
        "dit_base_finetuned_rvlcdip": 85_820_176,
        "dit_large_finetuned_rvlcdip": 303_342_608,
    }
)
"""The number of parameters of every variant: `models.build.num_params`, which needs JAX to count them."""
