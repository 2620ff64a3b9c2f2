"""What `export` writes is a model that the reference loads as one of its own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerances import EXPORT

from beit_jax.config import BeitConfig
from beit_jax.convert import export, load, to_torch
from beit_jax.convert.formats import FORMATS
from beit_jax.convert.formats.flax import FLAX
from beit_jax.convert.formats.format import SourceFormat
from beit_jax.convert.formats.openmmlab.mmseg import MMSEG
from beit_jax.convert.formats.rules import steps
from beit_jax.convert.formats.timm import TIMM
from beit_jax.convert.formats.transformers import HF, HF5
from beit_jax.convert.formats.unilm import UNILM
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.images import preset
from beit_jax.models.build import param_shapes
from beit_jax.variants import VARIANTS
from beit_jax.weights import NativeCheckpoint


def tiny(config: BeitConfig) -> BeitConfig:
    """A released model, made small."""
    size = (32, 32)
    if config.task == "semantic_segmentation":
        config = replace(config, num_hidden_layers=4, out_indices=(0, 1, 2, 3), auxiliary_channels=8)
    else:
        config = replace(config, num_hidden_layers=2)
    return replace(
        config, hidden_size=64, num_attention_heads=1, intermediate_size=24, image_size=size,
        patch_size=(8, 8), vocab_size=12, labels=config.labels[:3],
    )  # fmt: skip


def holds(naming: SourceFormat, config: BeitConfig) -> bool:
    """Which models exist under which names."""
    segments = config.task == "semantic_segmentation"
    if naming in (FLAX, TIMM, UNILM):  # transformers 4 had no Flax data2vec; the original segments in mmseg
        return not segments and (naming is not FLAX or config.model_type == "beit")
    if naming is MMSEG:
        return segments
    return naming in (HF, HF5) or (segments and config.model_type == "data2vec-vision")


def random_checkpoint(config: BeitConfig, seed: int = 0) -> NativeCheckpoint:
    rng = np.random.default_rng(seed)
    params = {n: rng.standard_normal(s).astype(np.float32) * 0.2 for n, s in param_shapes(config).items()}
    return NativeCheckpoint(config, preset("hf", config.image_size), params)


@given(st.sampled_from(sorted(VARIANTS)), st.sampled_from(FORMATS), st.integers(0, 10))
def test_every_table_inverts_itself_for_every_variant(variant: str, naming, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Export, then import: the same bits; and the rules cover the model exactly."""
    checkpoint = random_checkpoint(tiny(VARIANTS[variant]), seed)
    config = checkpoint.config
    assume(holds(naming, config))
    tensors = to_torch(config, checkpoint.params, naming)
    shapes = param_shapes(config)
    rules = [rule for rule in naming.rules(config, naming.own_prefix(config)) if rule.flax in shapes]
    used = []
    for path, step in steps(rules, shapes).items():
        leaf = np.empty(step.shape, np.float32)
        for names, layer in zip(step.layers, leaf if step.rule.stacked else [leaf], strict=True):
            step.rule.op.load([tensors[name] for name in names], 0, layer)
            used += names
        assert np.array_equal(leaf, checkpoint.params[path]), path
    assert sorted(used) == sorted(name for name in tensors if not naming.derived.search(name))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "ade20k" not in name])
def test_transformers_loads_an_exported_directory(tmp_path: Path, variant: str) -> None:
    """Every released configuration, tiny: nothing missing, nothing unexpected, and the same logits as ours."""
    import jax
    import transformers

    from beit_jax.models.build import build_model
    from beit_jax.tree import unflatten

    checkpoint = random_checkpoint(replace(tiny(VARIANTS[variant]), position_resize="bilinear"))
    assert export(checkpoint, tmp_path / "out", "hf") == []
    kind = getattr(transformers, checkpoint.config.to_hf()["architectures"][0])
    model, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.BeitImageProcessorPil.from_pretrained(tmp_path / "out")
    assert processor.size["height"] == 32

    pixel_values = reference.pixels(model)
    ours = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    found = jax.jit(lambda model, pixels: model(pixels))(ours, pixel_values)
    with torch.no_grad():
        expected = model.eval()(reference.to_torch(pixel_values))
    mine = found.logits if "logits" in expected else found.last_hidden_state
    theirs = expected.logits if "logits" in expected else expected.last_hidden_state
    assert np.abs(mine - theirs.numpy()).max() <= EXPORT * 10


def test_auto_classes_find_it(tmp_path: Path) -> None:
    import transformers

    export(random_checkpoint(tiny(VARIANTS["beit_base_patch16_224"])), tmp_path / "out", "hf")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model) is transformers.BeitForImageClassification


def test_original_file_has_what_the_original_state_dict_has(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tiny(VARIANTS["beit_base_patch16_224"]))
    notes = export(checkpoint, tmp_path / "out", "original")
    assert len(notes) == 1
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert {name for name in state if name.startswith("blocks.1.")} == {
        f"blocks.1.{rest}" for rest in (
            "gamma_1 gamma_2 norm1.weight norm1.bias attn.q_bias attn.v_bias attn.qkv.weight attn.proj.weight "
            "attn.proj.bias attn.relative_position_bias_table attn.relative_position_index norm2.weight norm2.bias "
            "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
        ).split()
    }  # fmt: skip
    index = state["blocks.1.attn.relative_position_index"]
    assert index.dtype == torch.int64 and index.shape == (17, 17) and index[0, 0] == 7 * 7 + 2
    again = load(resolve(tmp_path / "out" / "checkpoint.pth"))
    assert all(np.array_equal(again.params[name], leaf) for name, leaf in checkpoint.params.items())


def test_bfloat16_survives_the_pth(tmp_path: Path) -> None:
    import ml_dtypes

    checkpoint = random_checkpoint(tiny(VARIANTS["dit_base"]))
    params = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in checkpoint.params.items()}
    export(replace(checkpoint, params=params), tmp_path / "out", "original")
    again = load(resolve(tmp_path / "out" / "checkpoint.pth"))
    assert all(
        again.params[n].dtype == leaf.dtype and np.array_equal(again.params[n], leaf) for n, leaf in params.items()
    )


def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    masked = random_checkpoint(tiny(VARIANTS["beit_base_patch16_224_pt22k"]))
    with pytest.raises(BeitJaxError, match="timm's BEiT has no place for a masked-image head and a mask token"):
        export(masked, tmp_path / "out", "timm")
    data2vec = replace(masked, config=replace(masked.config, model_type="data2vec-vision"))
    with pytest.raises(BeitJaxError, match="no Data2VecVision model with a pre-training head"):
        export(data2vec, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_exported_timm_directory_reads_back(tmp_path: Path) -> None:
    """Names, configuration and preprocessing come back as they went; test_timm.py asks timm itself."""
    config = replace(tiny(VARIANTS["beit_base_patch16_224"]), position_resize="geometric_linear", vocab_size=8192)
    checkpoint = replace(random_checkpoint(config), processor=preset("timm", 32))
    export(checkpoint, tmp_path / "out", "timm")
    again = load(resolve(tmp_path / "out"))
    assert again.config == config and again.processor == checkpoint.processor
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_classes"] == 3
    assert to_torch(config, again.params, UNILM).keys() == to_torch(config, checkpoint.params, UNILM).keys()
