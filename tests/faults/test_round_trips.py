"""Every export is read back as what it was, or refused before a file is written: a product of all that can be combined.

A new layout is in the product by itself; a new model, or a new way of preparing images, is a row.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from beit_jax.config import BeitConfig
from beit_jax.convert import export, load
from beit_jax.convert.formats import LAYOUTS
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.images.processor import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, ade20k_processor, preset
from beit_jax.models.build import param_shapes
from beit_jax.weights import NativeCheckpoint

pytest.importorskip("torch", reason="the original layout is written by torch")

TINY = BeitConfig(
    image_size=(32, 32), patch_size=(8, 8), hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, vocab_size=12, position_resize="geometric",
)  # fmt: skip
CLASSES = {"task": "image_classification", "labels": ("cat", "dog", "eel")}
MASKED = {"task": "masked_image_modeling", "use_mask_token": True}
DATA2VEC = {"model_type": "data2vec-vision", "add_pooling_layer": False}
MAPS = {"num_hidden_layers": 4, "position_bias": "per_layer"}
SEGMENTS = {"task": "semantic_segmentation", "labels": ("a", "b"), "auxiliary_channels": 8, **MAPS}
MODELS = {
    "encoder": replace(TINY, position_bias="both"),
    "encoder, class token": replace(TINY, pooling="cls", position_bias="shared"),
    "encoder without pooling": replace(TINY, add_pooling_layer=False, use_absolute_position_embeddings=True),
    "classifier": replace(TINY, **CLASSES, position_bias="per_layer"),
    "classifier without a table": replace(TINY, **CLASSES, use_absolute_position_embeddings=True),
    "classifier, class token": replace(TINY, **CLASSES, pooling="cls", layer_scale_init_value=0.0),
    "classifier of transformers": replace(TINY, **CLASSES, layer_norm_eps=1e-12, position_resize="bilinear"),
    "classifier, another activation": replace(TINY, **CLASSES, hidden_act="gelu_pytorch_tanh"),
    "classifier, odd sizes": replace(
        TINY, **CLASSES, hidden_size=1408 // 16, num_attention_heads=8, intermediate_size=67
    ),
    "classifier, not square": replace(TINY, **CLASSES, image_size=(16, 40), position_bias="both"),
    "classifier of one channel": replace(TINY, **CLASSES, num_channels=1),
    "several labels": replace(TINY, **CLASSES, problem_type="multi_label_classification"),
    "regression": replace(TINY, **CLASSES, problem_type="regression"),
    "oblong patches": replace(TINY, **CLASSES, patch_size=(8, 4), position_bias="per_layer"),
    "oblong, with positions": replace(TINY, **CLASSES, image_size=(16, 40), use_absolute_position_embeddings=True),
    "data2vec classifier": replace(TINY, **CLASSES, **DATA2VEC),
    "pre-training": replace(TINY, **MASKED, position_bias="shared"),
    "pre-training, class token": replace(TINY, **MASKED, pooling="cls"),
    "pre-training, aggregation of shared biases": replace(
        TINY, **MASKED, aggregate_from=1, aggregation_layers=2, position_bias="shared"
    ),
    "pre-training, aggregation": replace(TINY, **MASKED, aggregate_from=1, aggregation_layers=2, position_bias="both"),
    "data2vec pre-training": replace(
        TINY, **MASKED, model_type="data2vec-vision", vocab_size=48, add_pooling_layer=False
    ),
    "segmenter": replace(TINY, **SEGMENTS, out_indices=(0, 1, 2, 3)),
    "segmenter of transformers": replace(TINY, **SEGMENTS, out_indices=(1, 2, 3, 4), feature_taps="hf"),
    "segmenter of mmseg": replace(TINY, **SEGMENTS, intermediate_size=96, out_indices=(0, 1, 2, 3)),
    "data2vec segmenter": replace(TINY, **SEGMENTS, **DATA2VEC, out_indices=(0, 1, 2, 3)),
    "backbone": replace(TINY, task="backbone", out_indices=(0, 1, 2, 3), add_fpn=True, **MAPS),
}
V2 = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
IMAGES = {
    "hf": preset("hf", 32),
    "hf of another size": preset("hf", 48, **V2),
    "unilm_eval": preset("unilm_eval", 32),
    "timm": preset("timm", 32, **V2),
    "timm, crop_pct": preset("timm", 32, crop_pct=0.95),
    "ade20k": ade20k_processor(32),
    "lanczos, squashed and cropped": ImageProcessor((40, 40), "lanczos", (32, 32), "half_even"),
    "pixels as they are": ImageProcessor(None, rescale_factor=None, mean=None, std=None),
}
SAID_BY_TIMM = {"hf", "unilm_eval", "timm", "timm, crop_pct", "lanczos, squashed and cropped"}
HELD_BY_TIMM = {
    "encoder", "encoder, class token", "classifier", "classifier without a table", "classifier, class token",
    "classifier, odd sizes", "classifier, not square", "classifier of one channel", "data2vec classifier",
    "several labels", "regression", "oblong patches", "oblong, with positions",
}  # fmt: skip
REFUSED = {
    "hf": {
        "pre-training, aggregation": "--aggregate-from 0",
        "pre-training, aggregation of shared biases": "--aggregate-from 0",
        "data2vec pre-training": "--to original",
        "oblong patches": "square patches only: export --to original or --to timm or --to mmpretrain",
        "oblong, with positions": "square images only: export --to original or --to timm or --to mmpretrain",
    },
    "original": {"pre-training, class token": "--to hf"},
    "timm": {name: "timm's BEiT has no place for" for name in MODELS.keys() - HELD_BY_TIMM},
    "mmpretrain": {
        "encoder": "shared and per-layer position biases at once: export --to hf or --to original or --to timm",
        "classifier, not square": "shared and per-layer position biases at once",
        "pre-training, class token": "a second norm before the pre-training head: export --to hf",
        "pre-training, aggregation": "shared and per-layer position biases at once: export --to original",
        "data2vec pre-training": "data2vec's regression of features: export --to original",
    }
    | {name: "no place for segmentation" for name in MODELS if "segmenter" in name or name == "backbone"},
    "mmseg": {name: "segmentation models only: export --to" for name in MODELS if "segmenter" not in name}
    | {name: "an MLP of 20, which is no multiple of 48" for name in MODELS if name.endswith("segmenter")}
    | {"segmenter of transformers": "a head that reads the embeddings: export --to hf or --to original"},
}


def checkpoint_of(config: BeitConfig, processor: ImageProcessor) -> NativeCheckpoint:
    if config.num_channels == 1:
        mean, std = processor.mean and processor.mean[:1], processor.std and processor.std[:1]
        processor = replace(processor, num_channels=1, mean=mean, std=std)
    if config.image_size[0] != config.image_size[1]:
        processor = preset("hf", config.image_size)
    rng = np.random.default_rng(0)
    params = {name: rng.random(shape, np.float32) for name, shape in param_shapes(config).items()}
    return NativeCheckpoint(config, processor, params)


def held_by(layout: str, config: BeitConfig) -> BeitConfig:
    """The configuration as far as the layout has a place for it: timm resizes in its own way, and has one family."""
    if layout != "timm":
        return config
    pooled = config.pooling == "mean"
    return replace(
        config, position_resize="geometric_linear", model_type="beit", add_pooling_layer=pooled, vocab_size=8192
    )


@pytest.mark.parametrize(("layout", "model"), [*product(LAYOUTS, MODELS)])
def test_an_export_is_read_back(layout: str, model: str, tmp_path: Path) -> None:
    for images, processor in IMAGES.items():
        checkpoint = checkpoint_of(MODELS[model], processor)
        destination = tmp_path / images
        if model in REFUSED[layout]:
            with pytest.raises(BeitJaxError) as caught:
                export(checkpoint, destination, layout)
            assert REFUSED[layout][model] in str(caught.value) and not destination.exists()
            continue
        notes = export(checkpoint, destination, layout)
        source = destination if layout in ("hf", "timm") else destination / "checkpoint.pth"
        again = load(resolve(source))
        assert again.config == held_by(layout, checkpoint.config)
        assert again.params.keys() == checkpoint.params.keys()
        assert all(np.array_equal(again.params[name], leaf) for name, leaf in checkpoint.params.items())
        if layout == "timm" and images not in SAID_BY_TIMM and checkpoint.config.image_size == (32, 32):
            assert any("timm cannot say" in note and checkpoint.processor.describe() in note for note in notes)
        else:
            assert again.processor == checkpoint.processor, images
            assert not any("timm cannot say" in note for note in notes)


@pytest.mark.parametrize("size", [14, 16, 32, 224, 336, 384, 512])
def test_every_edge_of_a_crop_survives_timms_percentage(size: int) -> None:
    """timm states the share of a crop, and cuts off the fraction of the edge that it computes of it."""
    from beit_jax.convert.formats.timm import images_of, timm_config

    config = replace(MODELS["classifier"], image_size=(size, size), patch_size=(2, 2))
    for edge in range(size, 2 * size):
        processor = ImageProcessor(edge, "bicubic", (size, size), crop_rounding="half_even")
        content = timm_config(config, processor, "beit_base_patch16_224", {})
        assert images_of(content["pretrained_cfg"], config, "config.json") == processor, edge


@pytest.mark.parametrize(("hidden", "intermediate"), [(1408, 6144), (544, 2176), (768, 2047), (88, 67), (1024, 4096)])
def test_every_mlp_survives_timms_ratio(hidden: int, intermediate: int) -> None:
    from beit_jax.convert.formats.timm import timm_config

    config = replace(TINY, hidden_size=hidden, num_attention_heads=1, intermediate_size=intermediate)
    ratio = timm_config(config, preset("hf", 32), "beit_base_patch16_224", {})["model_args"]["mlp_ratio"]
    assert int(hidden * ratio) == intermediate
