"""Segmentation and backbones against transformers, taps `hf`: logits, maps, loss, gradients, running statistics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from flax import nnx
from numpy.testing import assert_allclose
from tolerances import GRADIENT, MODEL, SEGMENTATION, STATISTICS

from beit_jax.convert import load, parity, to_torch
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.build import Model, statistics
from beit_jax.train.objectives.segmentation import segmentation_loss
from beit_jax.tree import flatten

pytestmark = pytest.mark.compiled

Converted = Callable[[torch.nn.Module], Model]


def run(model: Model, pixel_values: np.ndarray) -> Any:
    return jax.jit(lambda model, pixels: model(pixels))(model, pixel_values)


def channels_last(maps: torch.Tensor) -> np.ndarray:
    return maps.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40), (56, 16), (64, 48)], ids=str)
def test_logits_at_many_sizes(converted: Converted, size: tuple[int, int]) -> None:
    theirs = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION)
    pixel_values = reference.pixels(theirs, size=size)
    with torch.no_grad():
        expected = theirs(reference.to_torch(pixel_values))
    found = run(converted(theirs), pixel_values).logits
    assert np.abs(found).max() > 1.0
    assert_allclose(found, channels_last(expected.logits), rtol=0.0, atol=SEGMENTATION)


@pytest.mark.parametrize(
    "options",
    [
        {"use_auxiliary_head": False},
        {"auxiliary_num_convs": 2, "auxiliary_concat_input": True},
        {"pool_scales": [1, 3]},
        {
            "use_mean_pooling": False,
            "use_absolute_position_embeddings": True,
            "use_shared_relative_position_bias": True,
        },
        {"out_indices": [1, 2, 3, 5], "num_hidden_layers": 6},
        {"out_indices": [2, 4, 5, 6], "num_hidden_layers": 6},
    ],
    ids=str,
)
def test_options(converted: Converted, options: dict[str, Any]) -> None:
    theirs = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION | options)
    pixel_values = reference.pixels(theirs)
    with torch.no_grad():
        expected = theirs(reference.to_torch(pixel_values)).logits
    assert_allclose(run(converted(theirs), pixel_values).logits, channels_last(expected), rtol=0.0, atol=SEGMENTATION)


def test_data2vec(converted: Converted) -> None:
    theirs = reference.random_model("data2vec-vision", "semantic_segmentation", **reference.SEGMENTATION)
    pixel_values = reference.pixels(theirs)
    with torch.no_grad():
        expected = theirs(reference.to_torch(pixel_values)).logits
    assert_allclose(run(converted(theirs), pixel_values).logits, channels_last(expected), rtol=0.0, atol=SEGMENTATION)


@pytest.mark.thorough
def test_base_size_at_640_pixels(converted: Converted) -> None:
    """BEiT-base as published for ADE20K: 163 million parameters, 150 classes, every layer wide."""
    theirs = reference.random_model(
        task="semantic_segmentation", scale=0.1, image_size=640, num_labels=150, drop_path_rate=0.0,
        use_relative_position_bias=True, out_indices=[3, 5, 7, 11],
    )  # fmt: skip
    pixel_values = reference.pixels(theirs, batch=1)
    with torch.no_grad():
        expected = channels_last(theirs(reference.to_torch(pixel_values)).logits)
    found = run(converted(theirs), pixel_values).logits
    assert found.shape == (1, 160, 160, 150) and np.abs(expected).max() > 1.0
    assert_allclose(found, expected, rtol=0.0, atol=SEGMENTATION)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_indices": None},
        {"out_indices": None, "out_features": ["stem", "stage3"]},
        {"reshape_hidden_states": False, "use_mean_pooling": False},
        {"add_fpn": True},
    ],
    ids=str,
)
def test_backbone(converted: Converted, options: dict[str, Any]) -> None:
    settings = {key: value for key, value in reference.SEGMENTATION.items() if key != "num_labels"} | options
    theirs = reference.random_model(task="backbone", **settings)
    pixel_values = reference.pixels(theirs, size=(24, 40))
    with torch.no_grad():
        expected = theirs(reference.to_torch(pixel_values)).feature_maps
    found = run(converted(theirs), pixel_values).feature_maps
    assert len(found) == len(expected)
    for ours, reference_map in zip(found, expected, strict=True):
        maps = channels_last(reference_map) if reference_map.ndim == 4 else reference_map.numpy()
        assert_allclose(ours, maps, rtol=0.0, atol=MODEL)


@pytest.fixture(scope="module")
def step(converted_at: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One training step of the reference on a batch with ignored pixels, and ours on the same."""
    theirs = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION | {"auxiliary_num_convs": 2})
    ours = converted_at(theirs, tmp_path_factory.mktemp("step"))
    pixel_values = reference.pixels(theirs, batch=3)
    rng = np.random.default_rng(5)
    labels = rng.integers(0, theirs.config.num_labels, (3, 32, 32))
    labels[rng.random(labels.shape) < 0.2] = 255
    theirs.train()
    output = theirs(reference.to_torch(pixel_values), labels=torch.from_numpy(labels))
    output.loss.backward()

    graph, params, stats = nnx.split(ours, nnx.Param, nnx.BatchStat)

    @jax.jit
    def loss(params: Any, stats: Any) -> Any:
        model = nnx.merge(graph, params, stats)
        output = model(pixel_values, train=True)
        value = segmentation_loss(output, jnp.asarray(labels), model.config)
        return value, nnx.state(model, nnx.BatchStat)

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params, stats)
    return {
        "theirs": theirs, "ours": ours, "their loss": output.loss.item(), "our loss": float(value),
        "statistics": {name: np.asarray(leaf) for name, leaf in flatten(nnx.to_pure_dict(new)).items()},
        "gradients": {name: np.asarray(leaf) for name, leaf in flatten(nnx.to_pure_dict(gradients)).items()},
    }  # fmt: skip


def test_loss_and_every_gradient_leaf(step: dict[str, Any]) -> None:
    assert step["our loss"] == pytest.approx(step["their loss"], abs=1e-5)
    found = to_torch(step["ours"].config, step["gradients"])
    expected = {name: p.grad for name, p in reference.named_as_in_files(step["theirs"]).items()}
    found = {name: leaf for name, leaf in found.items() if name in expected}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:  # blocks that transformers' taps leave out: ours must be silent too
            assert not found[name].any(), name
            continue
        if name in ("fpn1.0.bias", "fpn1.3.bias", "fpn2.0.bias"):  # batch norm takes constants away: rounding in both
            assert max(np.abs(found[name]).max(), gradient.abs().max()) < 1e-7
            continue
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name}: the reference has no gradient, so nothing is tested"
        assert np.abs(found[name] - gradient.numpy()).max() <= GRADIENT * scale, name


def test_running_statistics_after_one_step(step: dict[str, Any]) -> None:
    assert step["statistics"].keys() == statistics(step["ours"].config)
    found = to_torch(step["ours"].config, step["statistics"])
    expected = reference.in_file_names(step["theirs"], dict(step["theirs"].named_buffers()))
    names = [name for name in expected if name.endswith(("running_mean", "running_var"))]
    assert len(names) == 2 * 15
    for name in names:
        assert_allclose(found[name], expected[name].numpy(), rtol=0.0, atol=STATISTICS, err_msg=name)


def test_evaluation_does_not_move_statistics(converted: Converted) -> None:
    ours = converted(reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION))
    before = flatten(nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat)))
    ours(np.zeros((1, 32, 32, 3), np.float32))
    after = flatten(nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat)))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_parity_command_compares_segmentation_and_backbones(tmp_path: Path) -> None:
    theirs = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION)
    stages = parity.check(resolve(reference.save(theirs, tmp_path / "segmenter")))
    assert stages[-1].name == "logits" and all(stage.passed for stage in stages)
    settings = reference.TINY | {"out_indices": [0, 2]}
    backbone = reference.random_model(task="backbone", **settings)
    stages = parity.check(resolve(reference.save(backbone, tmp_path / "backbone")))
    assert [stage.name for stage in stages[-2:]] == ["feature map 0", "feature map 1"]
    assert all(stage.passed for stage in stages)


def test_parity_with_original_taps_is_refused(tmp_path: Path) -> None:
    theirs = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION | {"num_hidden_layers": 6})
    source = reference.save(theirs, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"beit_jax": {"feature_taps": "original"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BeitJaxError, match="for which transformers has no setting"):
        parity.check(resolve(source))


def test_files_under_the_names_in_memory(tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` of transformers 5, running statistics and counters included."""
    theirs = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION)
    source = reference.save(theirs, tmp_path / "source")
    expected = load(resolve(source)).params
    (source / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), source / "pytorch_model.bin")
    found = load(resolve(source)).params
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_training_on_one_image_is_refused(converted: Converted) -> None:
    ours = converted(reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION))
    with pytest.raises(BeitJaxError, match="batch statistics need two values per channel"):
        ours(np.zeros((1, 32, 32, 3), np.float32), train=True)


def test_too_few_patches_are_refused(converted: Converted) -> None:
    ours = converted(reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION))
    with pytest.raises(BeitJaxError, match=r"at least 2x2 patches, found \(1, 4\)"):
        ours(np.zeros((1, 8, 32, 3), np.float32))


def test_head_dropout_needs_a_key(converted: Converted) -> None:
    ours = converted(reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION))
    pixel_values = reference.pixels(reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION))
    drawn = jax.jit(lambda key: ours(pixel_values, key=key).logits)
    plain, dropped, again = run(ours, pixel_values).logits, drawn(jax.random.key(0)), drawn(jax.random.key(0))
    assert np.array_equal(dropped, again) and not np.allclose(plain, dropped)
