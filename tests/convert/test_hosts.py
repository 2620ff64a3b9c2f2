"""Encoders within models of depth, detection and segmentation: their states are those that these models compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from beit_jax.cli.main import main
from beit_jax.convert import Options, load, plan
from beit_jax.convert.options import DEFAULT
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.tree import unflatten

HOSTS = Path(__file__).parent / "foreign/hosts"


def drawn(*size: int) -> np.ndarray:
    """The images of foreign/make_hosts.py, [2, height, width, 3]."""
    return np.random.default_rng(7).standard_normal((2, *size, 3)).astype(np.float32)


def computed(source: Path, images: np.ndarray, options: Options = DEFAULT) -> Any:
    checkpoint = load(resolve(source), options)
    model = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    return jax.jit(lambda model, images: model(images, output_hidden_states=True))(model, images)


def assert_equal(found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()


OPTIONS = {"midas.pt": DEFAULT, "zoedepth.pt": DEFAULT, "dit.pth": Options(num_heads=2)}  # of no published size


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_encoder_computes_what_it_computes_in_its_model(kind: str) -> None:
    path = HOSTS / kind
    found = computed(path, drawn(32, 32), OPTIONS[kind]).hidden_states[-1]
    assert_equal(found, np.load(path.with_suffix(".npy")))


def test_midas_resizes_position_biases_as_transformers_does() -> None:
    """Whereas the original and timm, whose names these are, interpolate on a geometric grid."""
    assert plan(resolve(HOSTS / "zoedepth.pt")).config.position_resize == "bilinear"
    assert_equal(computed(HOSTS / "midas.pt", drawn(32, 64)).hidden_states[-1], np.load(HOSTS / "midas_wide.npy"))


PARTS = {
    "midas.pt": ("pretrained.act_postprocess1 (6)", "pretrained.model.head (2)", "scratch ("),
    "zoedepth.pt": (
        "attractors (",
        "conditional_log_binomial (",
        "core.core.scratch (",
        "core.core.pretrained.model.head",
    ),
    "dit.pth": ("backbone.fpn_lateral2 (2)", "roi_heads (2)"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_the_parts_around_it_are_left_out_and_counted(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(HOSTS / kind), *["--num-heads", "2"] * (kind == "dit.pth")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "encoder taken from" in told and all(part in told for part in PARTS[kind]), told


@pytest.mark.parametrize("kind", ["midas.pt", "zoedepth.pt"])
def test_the_classifier_that_depth_models_carry_is_told_and_kept_on_request(kind: str) -> None:
    """timm's classes were never removed from MiDaS; they are the encoder's own, from before it was trained on depth."""
    decided = plan(resolve(HOSTS / kind))
    assert decided.config.task == "features"
    assert any("a classifier of 7 classes" in note and "--keep-head keeps it" in note for note in decided.notes)
    kept, state = load(resolve(HOSTS / kind), Options(keep_head=True)), torch.load(HOSTS / kind, weights_only=True)
    state = state.get("model", state)
    (name,) = (name for name in state if name.endswith("pretrained.model.head.weight"))
    assert kept.config.task == "image_classification" and kept.config.num_labels == 7
    assert np.array_equal(kept.params["classifier/kernel"], state[name].numpy().T)
    assert not any("--keep-head" in note for note in plan(resolve(HOSTS / kind), Options(keep_head=True)).notes)


@pytest.mark.parametrize("path", [HOSTS / "dit.pth", HOSTS.parent / "mmpretrain/mean.pth"], ids=["no head", "no host"])
def test_a_head_that_is_not_there_is_not_kept(path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"--keep-head: .* holds no encoder within another model that carries"):
        plan(resolve(path), Options(keep_head=True))


SIZE = {
    "image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48, "use_relative_position_bias": True, "drop_path_rate": 0.0,
}  # fmt: skip
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def backbone(**options: Any) -> Any:
    return transformers.BeitConfig(**SIZE, **STAGES, **options)


def depth() -> Any:
    config = transformers.DPTConfig(
        backbone_config=backbone(reshape_hidden_states=False), neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        hidden_size=32, is_hybrid=False,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def zoe_depth() -> Any:
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone(reshape_hidden_states=False), neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        bottleneck_features=8, num_relative_features=4,
    )  # fmt: skip
    return transformers.ZoeDepthForDepthEstimation(config)


def upernet() -> Any:
    config = transformers.UperNetConfig(
        backbone_config=backbone(), hidden_size=8, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=3
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mask2former() -> Any:
    narrow = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16}
    config = transformers.Mask2FormerConfig(backbone_config=backbone(add_fpn=True), **narrow, **layers)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def captioner() -> Any:
    words = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = transformers.BertConfig(**words, vocab_size=20, is_decoder=True, add_cross_attention=True)
    image = transformers.BeitModel(transformers.BeitConfig(**SIZE))
    return transformers.VisionEncoderDecoderModel(encoder=image, decoder=transformers.BertLMHeadModel(text))


def dual_encoder() -> Any:
    words = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = transformers.BertModel(transformers.BertConfig(**words, vocab_size=20))
    image = transformers.BeitModel(transformers.BeitConfig(**SIZE))
    return transformers.VisionTextDualEncoderModel(vision_model=image, text_model=text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [depth, zoe_depth, upernet, mask2former, captioner, dual_encoder], ids=lambda make: make.__name__
)
def test_models_of_transformers_around_an_encoder(make: Callable[[], Any], tmp_path: Path) -> None:
    model, generator = make().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1) * 0.5)
    model.save_pretrained(tmp_path)
    encoder = next(each for each in model.modules() if type(each).__name__ in ("BeitBackbone", "BeitModel"))
    images = drawn(64, 64)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    found = computed(tmp_path, images).hidden_states
    for ours, theirs in zip(found, expected.hidden_states, strict=True):
        assert_equal(ours, theirs.numpy())
