"""Channels as timm adapts them: its `in_chans` weights, and the directories of models of other channels, both ways."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tolerances import EXPORT

from beit_jax.convert import Options, export, load
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.tree import unflatten

timm = pytest.importorskip("timm", reason="timm is not installed; see pyproject.toml, extra timm")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore")]  # the reference warns of its own code

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5,
    "use_rel_pos_bias": True, "init_values": 0.1,
}  # fmt: skip
KERNEL = "beit/embeddings/patch_kernel"


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's directory of a model of RGB images."""
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", pretrained=False, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    directory = tmp_path_factory.mktemp("timm") / "rgb"
    timm.models._hub.save_for_hf(
        model, directory, model_args={key: value for key, value in SIZES.items() if key != "num_classes"}
    )
    return directory


def theirs(directory: Path, **options: Any) -> Any:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **options).eval()


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_channels_are_timms_in_chans(rgb: Path, channels: int) -> None:
    expected = theirs(rgb, in_chans=channels)
    found = load(resolve(rgb), Options(channels=channels))
    kernel = expected.patch_embed.proj.weight.detach().permute(2, 3, 1, 0).numpy()
    assert_allclose(found.params[KERNEL], kernel, rtol=0.0, atol=1e-6 if channels == 1 else 0.0)
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, channels)).astype(np.float32)
    with torch.no_grad():
        logits = expected(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    model = build_model(found.config, unflatten(found.params))
    assert_allclose(np.asarray(model(pixels).logits), logits, rtol=0.0, atol=EXPORT)
    recorded = json.loads((rgb / "config.json").read_text())["pretrained_cfg"]["mean"]
    assert_allclose(found.processor.mean, [np.mean(recorded)] * channels)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_goes_to_timm_and_back(rgb: Path, tmp_path: Path, channels: int) -> None:
    native = load(resolve(rgb), Options(channels=channels))
    export(native, tmp_path / "timm", "timm")
    model = theirs(tmp_path / "timm")
    pixels = np.random.default_rng(1).standard_normal((2, 32, 32, channels)).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    own = build_model(native.config, unflatten(native.params))
    assert_allclose(np.asarray(own(pixels).logits), logits, rtol=0.0, atol=EXPORT)
    again = load(resolve(tmp_path / "timm"))
    assert again.processor == native.processor and again.config.num_channels == channels
    # A directory that timm itself saves of a model with other channels.
    timm.models._hub.save_for_hf(model, tmp_path / "saved", model_args={**SIZES, "in_chans": channels})
    assert load(resolve(tmp_path / "saved")).config.num_channels == channels
