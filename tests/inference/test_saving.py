"""A live model becomes a native checkpoint, and the same model again."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import beit_jax
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import param_shapes
from beit_jax.tree import flatten, unflatten

CONFIG = beit_jax.BeitConfig(
    task="image_classification", image_size=(8, 8), patch_size=(4, 4), hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=8, position_bias="per_layer", labels=("cat", "dog", "owl"),
)  # fmt: skip
PROCESSOR = beit_jax.preset("hf", size=8)


def model(seed: int = 0, dtype: jnp.dtype = jnp.float32) -> nnx.Module:
    rng = np.random.default_rng(seed)
    leaves = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in param_shapes(CONFIG).items()}
    return beit_jax.build_model(CONFIG, unflatten(leaves))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_model_comes_back(tmp_path: Path, dtype: jnp.dtype) -> None:
    live = model(dtype=dtype)
    beit_jax.save_pretrained(str(tmp_path / "native"), live, PROCESSOR, provenance={"source": "a test"})
    checkpoint = beit_jax.load(tmp_path / "native")
    again, processor = beit_jax.from_pretrained(tmp_path / "native")
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    assert (again.config, processor, checkpoint.provenance) == (CONFIG, PROCESSOR, {"source": "a test"})
    assert {leaf.dtype for leaf in checkpoint.params.values()} == {np.dtype(dtype)}
    computed = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), live)  # `from_pretrained` computes in float32
    assert np.array_equal(again(images).logits, computed(images).logits)


def test_images_of_other_channels_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"images of 4 channels, the model takes 3; .* processor\.for_channels\(3\)"):
        beit_jax.save_pretrained(tmp_path / "native", model(), PROCESSOR.for_channels(4))
    assert not (tmp_path / "native").exists()


def test_what_was_trained_is_what_is_written(tmp_path: Path) -> None:
    """A model whose parameters were exchanged inside it, as optimizers of flax do."""
    live, other = model(0), model(1)
    nnx.update(live, nnx.state(other))
    beit_jax.save_pretrained(tmp_path / "native", live, PROCESSOR)
    written = beit_jax.load(tmp_path / "native").params
    assert all(
        np.array_equal(written[name], leaf) for name, leaf in flatten(nnx.to_pure_dict(nnx.state(other))).items()
    )


def test_an_earlier_checkpoint_is_replaced_on_request(tmp_path: Path) -> None:
    place = tmp_path / "native"
    beit_jax.save_pretrained(place, model(0), PROCESSOR)
    with pytest.raises(BeitJaxError, match="native: already exists"):
        beit_jax.save_pretrained(place, model(1), PROCESSOR)
    beit_jax.save_pretrained(place, model(1), PROCESSOR, overwrite=True)
    (place / "mine.txt").write_text("kept")
    with pytest.raises(BeitJaxError, match=r"mine\.txt"):
        beit_jax.save_pretrained(place, model(2), PROCESSOR, overwrite=True)
    assert (place / "mine.txt").read_text() == "kept"


def test_what_is_no_model_of_its_configuration_is_refused(tmp_path: Path) -> None:
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model())
    wider = model()
    wider.config = replace(CONFIG, labels=("cat", "dog"))
    for live, said in ((halves, "float16"), (wider, r"\(16, 2\)|\(2,\)")):
        with pytest.raises(BeitJaxError, match=said):
            beit_jax.save_pretrained(tmp_path / "native", live, PROCESSOR)
        assert list(tmp_path.iterdir()) == []
