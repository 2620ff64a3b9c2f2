"""A checkpoint is read for another input size, another patch size, and with a table for every layer."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import original_bias
import pytest
import reference
from numpy.testing import assert_allclose
from tolerances import RESIZE

from beit_jax.convert import Options, convert, load
from beit_jax.errors import BeitJaxError
from beit_jax.hub import Source, resolve
from beit_jax.models.adapt import resize_patch_kernel, resize_table
from beit_jax.models.position import resize_bias_table
from beit_jax.weights import load as load_native

SHARED = "beit/shared_bias_table"
LAYERS = "beit/blocks/attention/bias_table"


def table_of(side: int, *, heads: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(((2 * side - 1) ** 2 + 3, heads)).astype(np.float32)


@pytest.mark.parametrize(
    ("source", "target"), [(14, 16), (14, 24), (14, 30), (14, 32), (14, 40), (24, 14), (14, 12), (14, 10)]
)
def test_geometric_is_the_originals_bit_for_bit(source: int, target: int) -> None:
    table = table_of(source)
    found = resize_table(table, source=(source, source), target=(target, target), method="geometric")
    assert np.array_equal(found, original_bias.resize(table, source, target))
    inside_a_program = resize_bias_table(jnp.asarray(table), (source, source), (target, target), "geometric")
    assert_allclose(inside_a_program, found, rtol=0.0, atol=RESIZE)


def test_geometric_for_grids_that_are_not_square_resizes_each_axis_alone() -> None:
    table = table_of(6)
    wide = resize_table(table, source=(6, 6), target=(6, 9), method="geometric")
    both = resize_table(wide, source=(6, 9), target=(9, 9), method="geometric")
    assert_allclose(both, resize_table(table, source=(6, 6), target=(9, 9), method="geometric"), rtol=0.0, atol=RESIZE)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    options = reference.TINY | reference.BIAS["shared"] | {"num_labels": 3}
    return resolve(reference.save(reference.random_model(**options), tmp_path / "hf"))


@pytest.mark.parametrize("method", ["geometric", "geometric_linear", "bilinear"])
def test_image_size(source: Source, tmp_path: Path, method: str) -> None:
    table = load(source).params[SHARED]
    convert(source, tmp_path / "native", Options(image_size=48, position_resize=method))
    native = load_native(tmp_path / "native")
    assert native.config.image_size == (48, 48) and native.config.position_resize == method
    assert native.processor.resize == (48, 48)
    expected = resize_bias_table(jnp.asarray(table), (4, 4), (6, 6), method)
    assert_allclose(native.params[SHARED], expected, rtol=0.0, atol=RESIZE)
    assert native.provenance["options"] == {"image_size": 48, "position_resize": method}


def test_shared_table_for_every_layer(source: Source) -> None:
    table = load(source).params[SHARED]
    found = load(source, Options(position_bias="per_layer", image_size=(32, 48)))
    assert SHARED not in found.params and found.config.position_bias == "per_layer"
    expected = resize_table(table, source=(4, 4), target=(4, 6), method="bilinear")
    assert np.array_equal(found.params[LAYERS], np.stack([expected, expected]))


def test_per_layer_tables_cannot_be_shared_out_again(tmp_path: Path) -> None:
    options = reference.TINY | reference.BIAS["both"]
    source = resolve(reference.save(reference.random_model(**options), tmp_path / "hf"))
    with pytest.raises(BeitJaxError, match=r"both.*per_layer"):
        load(source, Options(position_bias="per_layer"))


def test_absolute_positions_and_layer_tables(tmp_path: Path) -> None:
    options = reference.TINY | reference.BIAS["per_layer"] | {"use_absolute_position_embeddings": True}
    source = resolve(reference.save(reference.random_model(**options), tmp_path / "hf"))
    found, before = load(source, Options(image_size=48)).params, load(source).params
    assert found["beit/embeddings/position_embeddings"].shape == (1, 37, 32)
    assert np.array_equal(
        found["beit/embeddings/position_embeddings"][:, 0], before["beit/embeddings/position_embeddings"][:, 0]
    )
    assert found[LAYERS].shape == (2, 11 * 11 + 3, 4)


def test_the_same_size_changes_nothing(source: Source) -> None:
    before, after = load(source).params, load(source, Options(image_size=32, patch_size=8)).params
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_size_must_fit_the_patch(source: Source) -> None:
    with pytest.raises(BeitJaxError, match=r"--image-size 33 33: .*8x8"):
        load(source, Options(image_size=33))


def test_patch_kernel_embeds_enlarged_patches_alike(source: Source) -> None:
    """FlexiViT's property: embedding an enlarged patch with the resized kernel gives the original embedding."""
    from beit_jax.resize import antialiased_bicubic_matrix

    kernel = np.random.default_rng(0).standard_normal((8, 8, 3, 5))
    patch = np.random.default_rng(1).standard_normal((8, 8, 3))
    enlarge = antialiased_bicubic_matrix(8, 14)
    enlarged = np.einsum("ty,yxc,sx->tsc", enlarge, patch, enlarge)
    found = np.einsum("yxc,yxcd->d", enlarged, resize_patch_kernel(kernel, (14, 14)))
    assert_allclose(found, np.einsum("yxc,yxcd->d", patch, kernel), rtol=0.0, atol=1e-9)
    resized = load(source, Options(patch_size=12))
    assert resized.config.image_size == (48, 48) and resized.config.grid == (4, 4)
    assert resized.params["beit/embeddings/patch_kernel"].shape == (12, 12, 3, 32)
