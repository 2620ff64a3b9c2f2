"""Taps `original` and mmseg's names, against a reference assembled here from torch's layers.

It follows the description of microsoft/unilm@768a3c8 beit/semantic_segmentation (encoder features after the 0-based
blocks in out_indices, no norm) and of mmseg 0.11's UPerHead and FCNHead; it shares no code with transformers.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from tolerances import SEGMENTATION
from torch import nn

from beit_jax.convert import convert, load, to_torch
from beit_jax.convert.formats.openmmlab.mmseg import MMSEG
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.attention import relative_position_index
from beit_jax.models.build import build_model
from beit_jax.train.objectives.segmentation import segmentation_loss
from beit_jax.tree import unflatten
from beit_jax.weights import load as read_native

DEPTH, DIM, HEADS, CLASSES, GRID = 12, 32, 4, 6, (4, 4)
TAPS = (3, 5, 7, 11)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.ones(DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attn = nn.Module()
        self.attn.q_bias, self.attn.v_bias = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros(7 * 7 + 3, HEADS))
        self.attn.register_buffer("relative_position_index", torch.from_numpy(relative_position_index(GRID)).long())
        self.attn.qkv, self.attn.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (b, n, _) = self.norm1(x), x.shape
        bias = torch.cat([self.attn.q_bias, torch.zeros(DIM), self.attn.v_bias])
        q, k, v = F.linear(y, self.attn.qkv.weight, bias).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        table = self.attn.relative_position_bias_table[self.attn.relative_position_index].permute(2, 0, 1)
        weights = ((q * (DIM // HEADS) ** -0.5) @ k.transpose(-2, -1) + table).softmax(-1)
        x = x + self.gamma_1 * self.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, DIM))
        return x + self.gamma_2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, DIM, 8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(DIM, DIM, 2, 2), nn.BatchNorm2d(DIM), nn.GELU(), nn.ConvTranspose2d(DIM, DIM, 2, 2)
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(DIM, DIM, 2, 2))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed.proj(pixels)
        rows, columns = x.shape[2:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                maps.append(x[:, 1:].transpose(1, 2).reshape(len(x), DIM, rows, columns))
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]


class ConvModule(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def upsample(x: torch.Tensor, size: Any) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DecodeHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(DIM, DIM, 1)) for scale in (1, 2, 3, 6)
        )
        self.bottleneck = ConvModule(5 * DIM, DIM, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(DIM, DIM, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(DIM, DIM, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * DIM, DIM, 3)
        self.conv_seg = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        pooled = [upsample(module(maps[3]), maps[3].shape[2:]) for module in self.psp_modules]
        levels.append(self.bottleneck(torch.cat([maps[3], *pooled], 1)))
        for i in (3, 2, 1):
            levels[i - 1] = levels[i - 1] + upsample(levels[i], levels[i - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + [levels[3]]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([upsample(x, outs[0].shape[2:]) for x in outs], 1)))


class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(DIM, 256, 3))
        self.conv_seg = nn.Conv2d(256, CLASSES, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.conv_seg(self.convs(maps[2]))


class Segmentor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.decode_head, self.auxiliary_head = Encoder(), DecodeHead(), AuxiliaryHead()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.backbone(pixels)
        return self.decode_head(maps), self.auxiliary_head(maps)


@pytest.fixture(scope="module")
def theirs() -> Segmentor:
    """Every parameter and every statistic drawn; matrices keep unit gain."""
    model, generator = Segmentor().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
            draw = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(draw.abs() + 0.5)
            elif value.is_floating_point() and value.ndim >= 2 and "table" not in name and "token" not in name:
                value.copy_(draw * value[0].numel() ** -0.5)
            elif value.is_floating_point():
                value.add_(draw * 0.2)
            elif name.endswith("num_batches_tracked"):
                value.fill_(160_000)
    return model


@pytest.fixture(scope="module")
def source(theirs: Segmentor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As mmseg saves it: no configuration, the class names under meta."""
    path = tmp_path_factory.mktemp("mmseg") / "upernet.pth"
    meta = {"CLASSES": tuple(f"class {i}" for i in range(CLASSES)), "iter": 160_000}
    torch.save({"meta": meta, "state_dict": theirs.state_dict(), "optimizer": {}}, path)
    return path


PIXELS = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)


def test_the_model_is_read_from_the_tensors(source: Path) -> None:
    checkpoint = load(resolve(source))
    config = checkpoint.config
    assert (config.task, config.feature_taps, config.out_indices) == ("semantic_segmentation", "original", TAPS)
    assert config.tapped_states == (4, 6, 8, 12) and config.position_resize == "geometric"
    assert config.image_size == (32, 32) and config.labels[5] == "class 5"
    assert checkpoint.processor.describe().startswith("resize within 32x128 bilinear (sampled)")


def test_logits_of_both_heads(theirs: Segmentor, source: Path) -> None:
    checkpoint = load(resolve(source))
    ours = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    found = jax.jit(lambda model, pixels: model(pixels))(ours, PIXELS)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    for logits, reference in zip((found.logits, found.auxiliary_logits), expected, strict=True):
        assert reference.abs().max() > 1.0
        assert_allclose(logits, reference.permute(0, 2, 3, 1).numpy(), rtol=0.0, atol=SEGMENTATION)


def test_the_published_loss_averages_over_ignored_pixels_too(theirs: Segmentor, source: Path) -> None:
    checkpoint = load(resolve(source))
    ours = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    labels = np.random.default_rng(2).integers(0, CLASSES, (2, 50, 41))
    labels[:, :20] = 255
    with torch.no_grad():
        logits = [upsample(x, (50, 41)) for x in theirs(torch.from_numpy(PIXELS).permute(0, 3, 1, 2))]
    target, found_logits = torch.from_numpy(labels), jax.jit(lambda model: model(PIXELS))(ours)
    for average, reduction in (("valid", "mean"), ("all", "none")):
        main, auxiliary = (F.cross_entropy(x, target, ignore_index=255, reduction=reduction).mean() for x in logits)
        found = segmentation_loss(found_logits, jnp.asarray(labels), checkpoint.config, average=average)
        assert float(found) == pytest.approx(float(main + 0.4 * auxiliary), abs=1e-5)
    with pytest.raises(BeitJaxError, match=r"labels: expected \[2, height, width\], found \[1, 50, 41\]"):
        segmentation_loss(found_logits, jnp.asarray(labels[:1]), checkpoint.config)


def test_round_trip_bit_for_bit(theirs: Segmentor, source: Path) -> None:
    checkpoint = load(resolve(source))
    tensors = to_torch(checkpoint.config, checkpoint.params, MMSEG)
    derived = ("relative_position_index", "num_batches_tracked")
    for name, tensor in theirs.state_dict().items():
        if not name.endswith(derived):
            assert np.array_equal(tensors[name], tensor.numpy()), name
    report = theirs.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()}, strict=False)
    assert all(name.endswith("relative_position_index") for name in report.missing_keys)
    assert not report.unexpected_keys


def test_statistics_live_in_the_native_checkpoint(source: Path, tmp_path: Path) -> None:
    plan = convert(resolve(source), tmp_path / "native")
    assert any("by the names and shapes of the tensors" in note for note in plan.notes)
    expected, found = load(resolve(source)), read_native(tmp_path / "native")
    assert found.config == expected.config and found.processor == expected.processor
    assert "decode_head/fuse/norm/var" in found.params and found.params.keys() == expected.params.keys()
    assert all(np.array_equal(found.params[name], expected.params[name]) for name in found.params)


def test_another_depth_needs_a_configuration(theirs: Segmentor, tmp_path: Path) -> None:
    fewer = {name: t for name, t in theirs.state_dict().items() if ".blocks.11." not in name}
    torch.save({"state_dict": fewer}, tmp_path / "fewer.pth")
    with pytest.raises(BeitJaxError, match=r"11 blocks.*12 and 24"):
        load(resolve(tmp_path / "fewer.pth"))


def test_a_wrong_class_count_is_named(source: Path, theirs: Segmentor, tmp_path: Path) -> None:
    config = load(resolve(source)).config.to_hf() | {"id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BeitJaxError, match=r"The file has 6 classes, id2label has 2: correct .*config\.json"):
        load(resolve(tmp_path))
