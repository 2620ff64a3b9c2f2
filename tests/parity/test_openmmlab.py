"""Exports are loaded strictly by mmpretrain and mmsegmentation, built by the config.py beside them: the same logits.

Run with ``pytest -m openmmlab`` where both are installed (pyproject.toml, extra openmmlab). mmcv-lite has no compiled
operators, for which mmsegmentation asks when it is imported, and of which BEiT needs none.
"""

import sys
import types
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tolerances import MODEL

from beit_jax.config import BeitConfig
from beit_jax.convert import export
from beit_jax.images.processor import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, ade20k_processor, preset
from beit_jax.models.build import build_model, param_shapes
from beit_jax.tree import unflatten
from beit_jax.weights import NativeCheckpoint

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed; see pyproject.toml, extra openmmlab")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # the libraries warn of their own code


class Operators(types.ModuleType):
    __getattr__ = staticmethod(lambda name: None if name.startswith("__") else print)


TINY = BeitConfig(
    image_size=(32, 32), patch_size=(8, 8), hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, vocab_size=12, position_resize="geometric", add_pooling_layer=True,
)  # fmt: skip
CLASSES = {"task": "image_classification", "labels": ("cat", "dog", "eel")}
MASKED = {"task": "masked_image_modeling", "use_mask_token": True}
SEGMENTS = {
    "task": "semantic_segmentation", "labels": ("a", "b"), "auxiliary_channels": 8, "num_hidden_layers": 4,
    "position_bias": "per_layer", "intermediate_size": 96,
}  # fmt: skip
CLASSIFIERS = {
    "mean, a table a layer": replace(TINY, **CLASSES, position_bias="per_layer"),
    "mean, a shared table": replace(TINY, **CLASSES, position_bias="shared"),
    "class token, positions": replace(TINY, **CLASSES, pooling="cls", use_absolute_position_embeddings=True),
    "no layer scale": replace(TINY, **CLASSES, layer_scale_init_value=0.0, position_bias="per_layer"),
    "another epsilon and activation": replace(TINY, **CLASSES, layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh"),
    "relu": replace(TINY, **CLASSES, hidden_act="relu"),
    "not square": replace(TINY, **CLASSES, image_size=(16, 40), position_bias="per_layer"),
    "oblong patches": replace(TINY, **CLASSES, patch_size=(8, 4), position_bias="per_layer"),
    "five channels": replace(TINY, **CLASSES, num_channels=5),
    "several labels": replace(TINY, **CLASSES, problem_type="multi_label_classification"),
    "data2vec": replace(TINY, **CLASSES, model_type="data2vec-vision", add_pooling_layer=False),
}
ENCODERS = {
    "mean": replace(TINY, position_bias="per_layer"),
    "class token": replace(TINY, pooling="cls", position_bias="shared"),
    "mask token": replace(TINY, use_mask_token=True, position_bias="shared"),
}
SEGMENTERS = {
    "published": replace(TINY, **SEGMENTS, out_indices=(0, 1, 2, 3)),
    "as transformers counts": replace(TINY, **SEGMENTS | {"num_hidden_layers": 5}, out_indices=(2, 3, 4, 5),
                                      feature_taps="hf"),
    "two convolutions": replace(TINY, **SEGMENTS, out_indices=(0, 1, 2, 3), auxiliary_num_convs=2,
                                auxiliary_concat_input=True, pool_scales=(1, 2)),
    "no auxiliary head": replace(TINY, **SEGMENTS, out_indices=(0, 1, 2, 3), use_auxiliary_head=False),
    "relu, not square": replace(TINY, **SEGMENTS, out_indices=(0, 1, 2, 3), hidden_act="relu", image_size=(32, 64)),
}  # fmt: skip


def drawn(config: BeitConfig, processor: ImageProcessor | None = None) -> NativeCheckpoint:
    """A checkpoint of which every number is drawn, of a gain that keeps activations in size."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in param_shapes(config).items():
        matrix = len(shape) > 1 and not name.endswith(("bias_table", "token", "embeddings"))
        inputs = np.prod(shape[1 if "blocks/" in name else 0 : -1])
        leaf = rng.standard_normal(shape) * (inputs**-0.5 if matrix else 0.2) + (0.0 if matrix else 0.5)
        leaf = np.abs(leaf) + 0.3 if name.endswith("/var") else leaf
        params[name] = leaf.astype(np.float32)
    found = preset("hf", config.image_size, num_channels=config.num_channels) if processor is None else processor
    return NativeCheckpoint(config, found, params)


def reloaded(checkpoint: NativeCheckpoint, directory: Path, library: str) -> Any:
    """The library's own model of the exported config.py, with the exported weights, each of them and no other."""
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint

    sys.modules.setdefault("mmcv._ext", Operators("mmcv._ext"))
    export(checkpoint, directory, library)
    import_module(f"{library}.utils").register_all_modules()
    settings = Config.fromfile(directory / "config.py")
    model = import_module(f"{library}.registry").MODELS.build(settings.model).eval()
    load_checkpoint(model, str(directory / "checkpoint.pth"), strict=True)
    return model


def images_of(config: BeitConfig) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, *config.image_size, config.num_channels)).astype(np.float32)


def as_torch(images: np.ndarray) -> Any:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def ours(checkpoint: NativeCheckpoint, *arguments: np.ndarray, **options: Any) -> Any:
    model = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    return jax.jit(lambda model, *inputs: model(*inputs, **options))(model, *arguments)


def assert_close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(np.asarray(found) - expected).max() <= MODEL * np.abs(expected).max()


@pytest.mark.parametrize("config", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_classifiers(config: BeitConfig, tmp_path: Path) -> None:
    checkpoint, images = drawn(config), images_of(config)
    model = reloaded(checkpoint, tmp_path / "out", "mmpretrain")
    with torch.no_grad():
        assert_close(ours(checkpoint, images).logits, model(as_torch(images)))


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)
def test_encoders(config: BeitConfig, tmp_path: Path) -> None:
    checkpoint, images = drawn(config), images_of(config)
    model = reloaded(checkpoint, tmp_path / "out", "mmpretrain")
    with torch.no_grad():
        (features,) = model.extract_feat(as_torch(images))
    assert_close(ours(checkpoint, images).pooler_output, features)


@pytest.mark.parametrize("aggregation", [False, True], ids=["BEiT", "BEiT v2"])
@pytest.mark.parametrize("bias", ["shared", "none"])
def test_pre_training(aggregation: bool, bias: str, tmp_path: Path) -> None:
    blocks = {"aggregate_from": 1, "aggregation_layers": 2} if aggregation else {}
    config = replace(TINY, **MASKED, **blocks, position_bias=bias, use_absolute_position_embeddings=bias == "none")
    checkpoint, images = drawn(config), images_of(config)
    mask = np.random.default_rng(2).random((2, 16)) < 0.4
    model = reloaded(checkpoint, tmp_path / "out", "mmpretrain")
    with torch.no_grad():
        tokens = model.backbone(as_torch(images), torch.from_numpy(mask.reshape(2, 4, 4)))
        if aggregation:
            expected = [model.head.cls_head(each) for each in model.neck(tokens, model.backbone.shared_rel_pos_bias)]
        else:
            expected = [model.head.cls_head(tokens[0][:, 1:])]
    found = ours(checkpoint, images, mask, **{"aggregate": True} if aggregation else {})
    for logits, theirs in zip((found.logits, found.aggregated_logits), expected, strict=False):
        assert_close(logits, theirs)


@pytest.mark.parametrize("config", SEGMENTERS.values(), ids=SEGMENTERS)
def test_segmenters(config: BeitConfig, tmp_path: Path) -> None:
    checkpoint, images = drawn(config), images_of(config)
    model = reloaded(checkpoint, tmp_path / "out", "mmseg")
    with torch.no_grad():
        features = model.extract_feat(as_torch(images))
        logits = model.decode_head(features)
        auxiliary = model.auxiliary_head(features) if config.use_auxiliary_head else None
    found = ours(checkpoint, images)
    assert_close(found.logits.transpose(0, 3, 1, 2), logits)
    if auxiliary is not None:
        assert_close(found.auxiliary_logits.transpose(0, 3, 1, 2), auxiliary)


PROCESSORS = {
    "crop": preset("unilm_eval", 32, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "squashed": preset("hf", 32),
    "squashed and cropped": ImageProcessor((40, 40), "lanczos", (32, 32), "half_even"),
    "grey": preset("unilm_eval", 32, num_channels=1),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_images_are_prepared_alike(processor: ImageProcessor, tmp_path: Path) -> None:
    """The pipeline of config.py, on a file: the same pixels, up to the rounding of (x - 127.5) / 127.5."""
    from mmengine.config import Config
    from mmengine.dataset import Compose

    model = reloaded(drawn(replace(TINY, **CLASSES, num_channels=processor.num_channels), processor),
                     tmp_path / "out", "mmpretrain")  # fmt: skip
    pixels = np.random.default_rng(3).integers(0, 256, (50, 71, 3) if processor.num_channels == 3 else (50, 71))
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "image.png")
    steps = Config.fromfile(tmp_path / "out/config.py").test_pipeline
    prepared = Compose(steps)({"img_path": str(tmp_path / "image.png")})
    found = model.data_preprocessor({"inputs": prepared["inputs"][None]})["inputs"]
    expected = processor([tmp_path / "image.png"])
    assert np.abs(found.numpy().transpose(0, 2, 3, 1) - expected).max() < 1e-6


def test_names_of_classes_are_told(tmp_path: Path) -> None:
    from mmpretrain import ImageClassificationInferencer

    export(drawn(CLASSIFIERS["mean, a table a layer"], PROCESSORS["crop"]), tmp_path / "out", "mmpretrain")
    infer = ImageClassificationInferencer(
        str(tmp_path / "out/config.py"), pretrained=str(tmp_path / "out/checkpoint.pth"), device="cpu"
    )
    image = np.random.default_rng(3).integers(0, 256, (50, 71, 3)).astype(np.uint8)
    assert infer(image)[0]["pred_class"] in ("cat", "dog", "eel")
    assert infer.classes == ("cat", "dog", "eel")


def test_segmentation_by_the_library_s_own_command(tmp_path: Path) -> None:
    """Loaded, prepared and cut into windows by mmsegmentation's own functions."""
    sys.modules.setdefault("mmcv._ext", Operators("mmcv._ext"))
    apis = import_module("mmseg.apis")
    export(drawn(SEGMENTERS["published"], ade20k_processor(32)), tmp_path / "out", "mmseg")
    model = apis.init_model(str(tmp_path / "out/config.py"), str(tmp_path / "out/checkpoint.pth"), device="cpu")
    image = np.random.default_rng(3).integers(0, 256, (40, 71, 3)).astype(np.uint8)
    found = apis.inference_model(model, image)
    assert model.dataset_meta["classes"] == ("a", "b")
    assert found.pred_sem_seg.data.shape[-2:] == (40, 71)
