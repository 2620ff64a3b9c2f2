"""The original code's semantics, through timm: epsilon 1e-6, and the table resize on a geometric grid.

Run with ``pytest -m timm`` where timm is installed; it needs torchvision, which needs its own build of torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
from numpy.testing import assert_allclose
from tolerances import EXPORT, MODEL, RESIZE

from beit_jax.config import BeitConfig
from beit_jax.convert import Options, export, load
from beit_jax.convert.formats.rules import steps
from beit_jax.convert.formats.unilm import UNILM
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.adapt import resize_patch_kernel
from beit_jax.models.build import build_model, param_shapes
from beit_jax.tree import unflatten

timm = pytest.importorskip("timm", reason="timm is not installed; see pyproject.toml, extra timm")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore")]  # the reference warns of its own code


def random_timm(**options: Any) -> Any:
    return randomised(timm.models.beit.Beit(num_classes=7, **options).eval())


def randomised(model: Any) -> Any:
    """Every parameter drawn, with unit gain, so that activations keep their size at any depth."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and parameter.shape[0] > 1:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(draw * 0.1)
    return model


def convert(model: Any, directory: Path) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """timm's model through a file, recognised from its names and shapes alone."""
    torch.save(model.state_dict(), directory / "timm.pth")
    checkpoint = load(resolve(directory / "timm.pth"))
    return checkpoint.config, checkpoint.params


SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "patch_size": 8, "init_values": 0.1}


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ((32, 32), SMALL | {"use_rel_pos_bias": True}),
        ((32, 32), SMALL | {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False}),
        ((224, 224), {"use_rel_pos_bias": True, "init_values": 0.1}),
    ],
    ids=["per layer", "shared", "base size"],
)
def test_forward(image: tuple[int, int], options: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_timm(img_size=image, **{"use_abs_pos_emb": False} | options)
    config, params = convert(theirs, tmp_path)
    assert (config.layer_norm_eps, config.num_labels, config.image_size) == (1e-6, 7, image)
    assert_same_logits(theirs, config, params, image)


def test_a_grid_that_is_not_square(tmp_path: Path) -> None:
    """What no file can tell: rows and columns. The configuration says them; timm is the oracle of the index."""
    theirs = random_timm(img_size=(16, 40), use_abs_pos_emb=False, use_rel_pos_bias=True, **SMALL)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(BeitJaxError, match="its positions are not of a square grid"):
        load(resolve(tmp_path / "timm.pth"))
    square, params = convert(random_timm(img_size=32, use_abs_pos_emb=False, use_rel_pos_bias=True, **SMALL), tmp_path)
    config = replace(square, image_size=(16, 40))
    rules = UNILM.rules(config, "")
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for path, step in steps([rule for rule in rules if rule.flax in params], param_shapes(config)).items():
        params[path] = np.empty(step.shape, np.float32)
        for names, layer in zip(step.layers, params[path] if step.rule.stacked else [params[path]], strict=True):
            step.rule.op.load([state[name] for name in names], 0, layer)
    assert_same_logits(theirs, config, params, (16, 40))


def assert_same_logits(theirs: Any, config: BeitConfig, params: dict[str, np.ndarray], image: tuple[int, int]) -> None:
    ours = build_model(config, unflatten(dict(params)))
    pixel_values = np.random.default_rng(0).standard_normal((1, *image, 3)).astype(np.float32)
    found = jax.jit(lambda model, pixels: model(pixels))(ours, pixel_values)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
    assert 0.5 < np.abs(expected).max() < 10
    assert_allclose(found.logits, expected, rtol=0.0, atol=MODEL)


TABLELESS = {"use_rel_pos_bias": False, "use_abs_pos_emb": True}


@pytest.mark.parametrize(
    ("architecture", "options", "heads"),
    [
        ("eva_giant_patch14_224", {"embed_dim": 704, "num_heads": 8, "img_size": 28}, 8),
        ("beit_base_patch16_224", TABLELESS | {"embed_dim": 128, "num_heads": 4, "img_size": 32}, 4),
        ("beit_base_patch16_224", TABLELESS | {"img_size": 32}, 12),
        ("beit_base_patch16_224", {"embed_dim": 96, "num_heads": 3, "img_size": (32, 64)}, 3),
    ],
)
def test_directories_that_timm_saves(architecture: str, options: dict[str, Any], heads: int, tmp_path: Path) -> None:
    """Heads of 88, 32 and 64 channels, and a grid of two shapes: timm's own config.json says them, no tensor does."""
    theirs = randomised(timm.create_model(architecture, depth=2, num_classes=7, **options).eval())
    timm.models.save_for_hf(theirs, tmp_path)
    checkpoint = load(resolve(tmp_path), Options(image_preset="hf"))
    assert checkpoint.config.num_attention_heads == heads
    assert_same_logits(theirs, checkpoint.config, checkpoint.params, checkpoint.config.image_size)


ARCHITECTURES = timm.list_models("beit_*") + timm.list_models("beitv2_*")


def test_there_are_seven_architectures() -> None:
    assert len(ARCHITECTURES) == 7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_at_full_size(name: str, tmp_path: Path) -> None:
    theirs = randomised(timm.create_model(name, num_classes=7).eval())
    config, params = convert(theirs, tmp_path)
    side = theirs.default_cfg["input_size"][-1]
    assert config.image_size == (side, side)
    assert_same_logits(theirs, config, params, (side, side))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_large_patch16_224"])
def test_an_exported_directory_is_a_timm_model(name: str, tmp_path: Path) -> None:
    """By ``create_model`` on the directory; by ``load_state_dict(strict=True)`` into the architecture."""
    theirs = randomised(timm.create_model(name, num_classes=7).eval())
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    export(load(resolve(tmp_path / "timm.pth")), tmp_path / "out", "timm")
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    plain = timm.create_model(name, num_classes=7).eval()
    plain.load_state_dict(tensors, strict=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected = theirs(image)
        assert torch.equal(plain(image), expected)
        assert (loaded(image) - expected).abs().max() <= EXPORT


def test_patch_resampling_is_timms() -> None:
    """timm inverts the resize in float32; against the same in float64 ours is the nearer, and right to rounding."""
    from timm.layers import resample_patch_embed

    kernel = np.random.default_rng(0).standard_normal((16, 16, 3, 8)).astype(np.float32)
    for size in ((8, 8), (14, 14), (32, 32), (12, 20)):
        basis = torch.eye(16 * 16, dtype=torch.float64).reshape(-1, 1, 16, 16)
        resize = torch.nn.functional.interpolate(basis, size, mode="bicubic", antialias=True).reshape(256, -1).T
        inverse = torch.linalg.pinv(resize.T).numpy()
        exact = (inverse @ kernel.reshape(256, -1)).reshape(*size, 3, 8)
        theirs = resample_patch_embed(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()), list(size)).numpy()
        ours = resize_patch_kernel(kernel, size)
        assert_allclose(ours, exact, rtol=0.0, atol=RESIZE)
        assert np.abs(ours - exact).max() <= np.abs(theirs.transpose(2, 3, 1, 0) - exact).max()


@pytest.mark.parametrize(("source", "target"), [((14, 14), (24, 24)), ((14, 14), (16, 20)), ((10, 6), (14, 14))])
def test_geometric_linear_resize_is_timms(source: tuple[int, int], target: tuple[int, int]) -> None:
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    from beit_jax.models.position import num_relative_offsets, resize_bias_table

    table = np.random.default_rng(0).standard_normal((num_relative_offsets(source), 4)).astype(np.float32)
    expected = resize_rel_pos_bias_table(
        torch.from_numpy(table), new_window_size=target, new_bias_shape=(num_relative_offsets(target), 4),
        **({} if source[0] == source[1] else {"old_window_size": source}),
    )  # fmt: skip
    found = resize_bias_table(jax.numpy.asarray(table), source, target, "geometric_linear")
    assert_allclose(found, expected, rtol=0.0, atol=MODEL)
