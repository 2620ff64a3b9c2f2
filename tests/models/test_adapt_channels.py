"""The patch projection of a checkpoint for another number of channels: timm's rule, written again with torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose

from beit_jax.convert import Options, convert, export, load
from beit_jax.errors import BeitJaxError
from beit_jax.hub import Source, resolve
from beit_jax.models.adapt import channel_kernel
from beit_jax.weights import load as load_native

KERNEL = "beit/embeddings/patch_kernel"


def timms_rule(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """[d, c, h, w] -> [d, channels, h, w]. Source: timm 1.0.31 timm/models/_manipulate.py."""
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    old = weight.shape[1]
    repeated = weight.float().repeat(1, -(-channels // old), 1, 1)[:, :channels]
    return (repeated * (old / float(channels))).to(weight.dtype)


@pytest.mark.parametrize("old", [1, 3, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 12, 13])
def test_the_rule_is_timms(old: int, new: int) -> None:
    weight = torch.randn(8, old, 4, 6, generator=torch.Generator().manual_seed(0))
    kernel = np.ascontiguousarray(weight.permute(2, 3, 1, 0).numpy())
    if old == new:
        return
    expected = timms_rule(weight, new).permute(2, 3, 1, 0).numpy()
    assert_allclose(channel_kernel(kernel, new), expected, rtol=0.0, atol=1e-6 if new == 1 else 0.0)
    in_half = timms_rule(weight.half(), new).float().permute(2, 3, 1, 0).numpy()
    kernel = kernel.astype(np.float16).astype(np.float32)
    assert_allclose(channel_kernel(kernel, new, stored=np.float16), in_half, rtol=0.0, atol=1e-2 if new == 1 else 0.0)


def test_grey_images_in_one_channel_embed_as_in_three() -> None:
    rng = np.random.default_rng(0)
    kernel, grey = rng.standard_normal((4, 4, 3, 5)), rng.standard_normal((4, 4, 1))
    three = np.einsum("yxc,yxcd->d", np.repeat(grey, 3, 2), kernel)
    one = np.einsum("yxc,yxcd->d", grey, channel_kernel(kernel.astype(np.float32), 1).astype(np.float64))
    assert_allclose(one, three, rtol=1e-5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    options = reference.TINY | reference.BIAS["shared"] | {"num_labels": 3}
    directory = reference.save(reference.random_model(**options), tmp_path_factory.mktemp("source") / "hf")
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.4, 0.5, 0.7], "image_std": [0.2, 0.3, 0.4]}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return resolve(directory)


def test_conversion_adapts_kernel_and_images(source: Source, tmp_path: Path) -> None:
    three = load(source).params[KERNEL]
    for channels in (1, 2, 4, 13):
        plan = convert(source, tmp_path / str(channels), Options(channels=channels))
        native = load_native(tmp_path / str(channels))
        assert native.config.num_channels == native.processor.num_channels == channels
        assert np.array_equal(native.params[KERNEL], channel_kernel(three, channels))
        assert_allclose(native.processor.mean, [1.6 / 3] * channels)
        assert_allclose(native.processor.std, [0.3] * channels)
        assert any(f"patch projection for {channels} channel" in note for note in plan.notes)


def test_a_list_says_which_channel_comes_from_which(source: Source) -> None:
    three = load(source).params[KERNEL]
    native = load(source, Options(channels_from=(2, 1, 0)))
    assert np.array_equal(native.params[KERNEL], three[:, :, ::-1])
    assert native.processor.mean == (0.7, 0.5, 0.4)
    native = load(source, Options(channels=4, channels_from=(0, 0, 2, 1), bands=(9, 8, 7, 1)))
    assert np.array_equal(native.params[KERNEL], three[:, :, [0, 0, 2, 1]] * np.float32(0.75))
    assert native.processor.std == (0.2, 0.2, 0.4, 0.3) and native.processor.bands == (9, 8, 7, 1)


def test_channels_and_patch_size_together(source: Source) -> None:
    both = load(source, Options(channels=2, patch_size=16)).params[KERNEL]
    patch = load(source, Options(patch_size=16)).params[KERNEL]
    assert_allclose(both, channel_kernel(patch, 2), atol=1e-6)


def test_every_export_keeps_the_channels(source: Source, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, BeitForImageClassification

    native = load(source, Options(channels=4, channels_from=(0, 1, 2, 0)))
    export(native, tmp_path / "hf", "hf")
    model = BeitForImageClassification.from_pretrained(tmp_path / "hf")
    assert model.config.num_channels == 4
    assert tuple(AutoImageProcessor.from_pretrained(tmp_path / "hf").image_mean) == (0.4, 0.5, 0.7, 0.4)
    again = load(resolve(tmp_path / "hf"))
    assert again.config == native.config and again.processor == native.processor
    assert all(np.array_equal(leaf, again.params[name]) for name, leaf in native.params.items())
    back = load(resolve(tmp_path / "hf"), Options(channels=1))
    assert_allclose(back.params[KERNEL][:, :, 0], native.params[KERNEL].sum(axis=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "--channels: expected 1 to"),
        ({"channels_from": (0, 3)}, "--channels-from 0 3: expected channels of the checkpoint, 0 to 2"),
        ({"channels_from": (0, -1)}, "--channels-from: expected numbers from 0"),
        ({"channels": 3, "channels_from": (0, 1)}, "--channels-from: expected 3 numbers"),
        ({"bands": (0, 1, 2)}, "--bands: expected numbers from 1"),
        ({"bands": (4, 1)}, "--bands: the model takes 3 channels"),
        ({"channels": 4, "bands": (4, 1)}, "--bands: expected 4 numbers"),
    ],
)
def test_what_no_image_has_is_refused(source: Source, options: dict[str, object], message: str) -> None:
    with pytest.raises(BeitJaxError) as caught:
        load(source, Options(**options))  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
