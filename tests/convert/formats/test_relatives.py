"""BEiT-3's vision tower and the ViTs with a bias of the keys: read right, given back, or refused by name.

The files were written by the libraries (`tests/convert/foreign/make_relatives.py`), with what these computed of them.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from beit_jax.config import BeitConfig
from beit_jax.convert import Options, convert, export, load, plan
from beit_jax.convert.formats.torchscale import TORCHSCALE
from beit_jax.convert.formats.vit import VIT
from beit_jax.convert.reference import Reference
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.images.processor import IMAGENET_MEAN
from beit_jax.models.build import build_model
from beit_jax.train.initial.model_config import model_config
from beit_jax.train.initial.parameters import checkpoint_report
from beit_jax.train.recipes import recipe_named
from beit_jax.tree import flatten, unflatten
from beit_jax.weights.native import NativeCheckpoint
from beit_jax.weights.native import load as load_native

FOREIGN = Path(__file__).parents[1] / "foreign"
IMAGES = np.load(FOREIGN / "images.npy")
TWO = Options(num_heads=2)
Output = Callable[[Any], jax.Array]


def logits(output: Any) -> jax.Array:
    return output.logits


def pooled(output: Any) -> jax.Array:
    return output.pooler_output


KINDS: dict[str, tuple[str, Options, Output]] = {
    "beit3/classifier": ("beit3/classifier.pth", TWO, logits),
    "beit3/retrieval": ("beit3/retrieval.pth", TWO, pooled),
    "beit3/timm": ("beit3/timm", Options(), logits),
    "vit/deit": ("vit/deit", Options(), logits),
    "vit/eva_large": ("vit/eva_large", Options(), logits),
    "vit/deit3": ("vit/deit3", Options(), logits),
    "vit/dinov2": ("vit/dinov2", Options(), pooled),
    "vit/eva_giant": ("vit/eva_giant", Options(), logits),
    "originals/mae": ("originals/mae.pth", TWO, lambda output: output.last_hidden_state),
    "originals/mae_classifier": ("originals/mae_classifier.pth", TWO, logits),
    "originals/ibot": ("originals/ibot.pth", replace(TWO, weights="teacher"), pooled),
}


def read(kind: str) -> NativeCheckpoint:
    source, options, _ = KINDS[kind]
    return load(resolve(FOREIGN / source), options)


def computed(checkpoint: NativeCheckpoint, output: Output) -> np.ndarray:
    config = checkpoint.config
    return np.asarray(jax.jit(lambda p: output(build_model(config, p)(IMAGES)))(unflatten(dict(checkpoint.params))))


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_library(kind: str) -> None:
    assert_near(computed(read(kind), KINDS[kind][2]), np.load(FOREIGN / f"{kind}.npy"))


def test_fields_and_images_are_those_of_the_originals() -> None:
    retrieval = plan(resolve(FOREIGN / "beit3/retrieval.pth"), TWO)
    config, images = retrieval.config, retrieval.processor
    assert (config.use_key_bias, config.use_sub_norm, config.embedding_size) == (True, True, 16)
    assert (config.layer_norm_eps, config.pooling, config.use_mask_token) == (1e-5, "cls", True)
    assert (images.resize, images.crop, images.mean) == ((16, 16), None, (0.5, 0.5, 0.5))
    assert any("26 tensors" in note and "language_head" in note for note in retrieval.notes)
    classifier = plan(resolve(FOREIGN / "beit3/classifier.pth"), TWO)
    assert (classifier.config.pooling, classifier.processor.resize) == ("mean", 16)
    mae = plan(resolve(FOREIGN / "originals/mae.pth"), TWO)
    assert (mae.config.layer_norm_eps, mae.config.use_mask_token, mae.processor.mean) == (1e-6, False, IMAGENET_MEAN)
    assert any("decoder_blocks" in note for note in mae.notes)
    giant = plan(resolve(FOREIGN / "vit/eva_giant")).config
    assert not giant.use_key_bias and giant.use_absolute_position_embeddings and not giant.layer_scale_init_value


def test_a_training_file_of_a_student_and_a_teacher_asks_which() -> None:
    with pytest.raises(BeitJaxError, match="--weights student or teacher"):
        plan(resolve(FOREIGN / "originals/ibot.pth"), TWO)
    assert plan(resolve(FOREIGN / "originals/ibot.pth"), replace(TWO, weights="student")).config.use_key_bias


def test_a_step_of_training_gives_the_library_s_outputs() -> None:
    """Gradients of every leaf, the norms within the branches and the bias of the keys among them: a step of SGD."""
    checkpoint = read("beit3/timm")
    params = unflatten(dict(checkpoint.params))

    def loss(params: Any) -> jax.Array:
        found = build_model(checkpoint.config, params)(IMAGES).logits
        return optax.softmax_cross_entropy_with_integer_labels(found, jnp.arange(3)).mean()

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(leaf).max() > 0 for name, leaf in flatten(gradients).items() if not name.endswith("qkv_bias"))
    stepped = jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients)
    found = computed(replace(checkpoint, params=flatten(stepped)), logits)
    assert_near(found, np.load(FOREIGN / "beit3/timm_after_a_step.npy"))


def test_a_bias_of_the_keys_changes_nothing_but_stays() -> None:
    checkpoint = read("vit/deit")
    name = "beit/blocks/attention/qkv_bias"
    other = checkpoint.params[name].copy()
    other[:, 1] += 3.0
    changed = replace(checkpoint, params={**checkpoint.params, name: other})
    assert_near(computed(changed, logits), computed(checkpoint, logits))
    tensors = VIT.to_torch(changed.config, changed.params)
    original = load_file(FOREIGN / "vit/deit/model.safetensors")
    added = np.repeat(np.float32([0, 3, 0]), 16)
    assert np.array_equal(tensors["blocks.0.attn.qkv.bias"], original["blocks.0.attn.qkv.bias"] + added)


@pytest.mark.parametrize("kind", ["beit3/timm", "vit/deit", "vit/eva_large", "vit/dinov2"])
def test_timm_s_names_come_back(kind: str, tmp_path: Path) -> None:
    checkpoint = read(kind)
    assert export(checkpoint, tmp_path / "out", "timm") == []
    found, original = (load_file(path / "model.safetensors") for path in (tmp_path / "out", FOREIGN / kind))
    assert found.keys() == original.keys()
    assert all(np.array_equal(found[name], original[name]) for name in original)
    again = load(resolve(tmp_path / "out"))
    assert (again.config, again.processor) == (checkpoint.config, checkpoint.processor)


def test_positions_without_a_row_of_the_class_token_get_one_of_zeros(tmp_path: Path) -> None:
    checkpoint = read("vit/deit3")
    table = checkpoint.params["beit/embeddings/position_embeddings"]
    assert table.shape == (1, 17, 16) and not table[:, 0].any()
    export(checkpoint, tmp_path / "out", "timm")
    assert_near(computed(load(resolve(tmp_path / "out")), logits), np.load(FOREIGN / "vit/deit3.npy"))


@pytest.mark.parametrize(
    ("rows", "arguments", "size", "zeros"),
    [(25, {"img_size": [16, 24]}, (16, 24), 0), (24, {"img_size": [16, 24]}, (16, 24), 1),
     (16, {"img_size": [8, 32]}, (8, 32), 1), (25, {}, (20, 20), 1)],
)  # fmt: skip
def test_rows_are_counted_by_the_size_that_timm_states(
    rows: int, arguments: dict[str, Any], size: tuple[int, int], zeros: int, tmp_path: Path
) -> None:
    """4x6 patches and a class token are 25 rows too, and no 5x5 patches."""
    content = json.loads((FOREIGN / "vit/deit/config.json").read_text())
    kept = {key: value for key, value in content["model_args"].items() if key != "img_size"}
    content["pretrained_cfg"].pop("input_size")
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_args": kept | arguments}))
    tensors = load_file(FOREIGN / "vit/deit/model.safetensors")
    table = np.arange(1, rows * 16 + 1, dtype=np.float32).reshape(1, rows, 16)
    save_file(tensors | {"pos_embed": table}, tmp_path / "model.safetensors")
    found = load(resolve(tmp_path), Options(image_preset="hf"))
    assert found.config.image_size == size
    assert np.array_equal(found.params["beit/embeddings/position_embeddings"][:, zeros:], table)


@pytest.mark.parametrize(
    ("architecture", "arguments", "epsilon"),
    [("vit_base_patch16_224", {}, 1e-6), ("beit3_base_patch16_224", {}, 1e-5),
     ("beit3_base_patch16_224", {"norm_layer": "layernorm"}, 1e-6)],
)  # fmt: skip
def test_epsilon_is_that_of_timm_s_architecture(
    architecture: str, arguments: dict[str, Any], epsilon: float, tmp_path: Path
) -> None:
    """Norms within the branches are arguments of every ViT of timm, and do not say it."""
    content = json.loads((FOREIGN / "beit3/timm/config.json").read_text())
    content |= {"architecture": architecture, "model_args": content["model_args"] | arguments}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((FOREIGN / "beit3/timm/model.safetensors").read_bytes())
    found = load(resolve(tmp_path))
    assert (found.config.layer_norm_eps, found.config.use_sub_norm) == (epsilon, True)
    export(found, tmp_path / "out", "timm")
    assert plan(resolve(tmp_path / "out")).config == found.config


@pytest.mark.parametrize("kind", ["beit3/classifier", "beit3/retrieval"])
def test_torchscale_s_names_come_back(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    checkpoint = read(kind)
    export(checkpoint, tmp_path / "out", "original")
    found = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["model"]
    original = torch.load(FOREIGN / f"{kind}.pth", weights_only=True)["model"]
    lacking = original.keys() - found.keys()
    assert all(TORCHSCALE.foreign.search(name) for name in lacking) and not found.keys() - original.keys()
    for name, tensor in found.items():
        unused = 2 if "embed_positions" in name else 0  # rows that fairseq's count leaves out
        assert torch.equal(tensor[unused:], original[name][unused:]) if unused else torch.equal(tensor, original[name])
    again = load(resolve(tmp_path / "out/checkpoint.pth"))
    assert (again.config, again.processor) == (checkpoint.config, checkpoint.processor)


def test_what_transformers_cannot_hold_is_refused_with_a_way_out(tmp_path: Path) -> None:
    for kind, words in (
        ("beit3/timm", "no bias of the keys and no norms within its branches: export --to original or --to timm"),
        ("vit/deit", "no bias of the keys: export --to timm"),
        ("beit3/retrieval", "no embedding of images: export --to original"),
    ):
        with pytest.raises(BeitJaxError, match=words):
            export(read(kind), tmp_path / "out")
    for layout in ("mmpretrain", "peft"):
        with pytest.raises(BeitJaxError):
            export(read("vit/deit"), tmp_path / "out", layout, source=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_native_checkpoint_says_and_checks_its_fields(tmp_path: Path) -> None:
    convert(resolve(FOREIGN / "beit3/retrieval.pth"), tmp_path / "native", TWO)
    checkpoint = load_native(tmp_path / "native")
    assert checkpoint.config == read("beit3/retrieval").config
    file = tmp_path / "native/config.json"
    own = json.loads(file.read_text())
    assert own["beit_jax"] | {"use_key_bias": True, "use_sub_norm": True, "embedding_size": 16} == own["beit_jax"]
    for key, wrong in (("use_key_bias", False), ("use_sub_norm", False), ("embedding_size", 8), ("embedding_size", 0)):
        file.write_text(json.dumps(own | {"beit_jax": own["beit_jax"] | {key: wrong}}))
        with pytest.raises(BeitJaxError, match=f"config.json: beit_jax.{key}"):
            load_native(tmp_path / "native")


def test_a_classifier_on_the_tower_of_retrieval(tmp_path: Path) -> None:
    options = replace(TWO, num_labels=2, seed=0)
    found = load(resolve(FOREIGN / "beit3/retrieval.pth"), options)
    assert (found.config.embedding_size, found.config.num_labels) == (0, 2)
    assert not any("embedding_head" in name for name in found.params)


@pytest.mark.parametrize("kind", ["vit/deit", "beit3/timm", "beit3/retrieval"])
@pytest.mark.parametrize("name", ["beit_base_ft1k", "finetune", "beit_base_pt22k"])
def test_training_starts_from_a_relative(kind: str, name: str) -> None:
    """The model that is trained has the leaves of its blocks, whatever its head; an embedding is dropped."""
    checkpoint, recipe = read(kind), recipe_named(name)
    masked = name.endswith("pt22k")
    labels, task = ((), "masked_image_modeling") if masked else (("a", "b"), "image_classification")
    config = model_config(recipe, labels, checkpoint.config, task=task)  # type: ignore[arg-type]
    assert (config.use_key_bias, config.use_sub_norm) == (True, checkpoint.config.use_sub_norm)
    report = checkpoint_report(checkpoint, config)
    assert not any("blocks" in leaf for leaf in (*report.drawn, *report.dropped))
    assert ("beit/embedding_head/kernel" in report.dropped) == (kind == "beit3/retrieval")


def test_parity_says_that_transformers_has_no_such_model() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(BeitJaxError, match="nothing to compare with"):
        Reference(plan(resolve(FOREIGN / "vit/deit")))


def test_fields_without_sense_are_refused() -> None:
    with pytest.raises(BeitJaxError, match="embedding_size"):
        BeitConfig(embedding_size=-1)
    with pytest.raises(BeitJaxError, match="embedding_size"):
        BeitConfig(task="image_classification", labels=("a", "b"), embedding_size=4)


ONE = np.ones((16,), np.float32)
ADDED: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "DeiT's distillation": (lambda s: s | {"dist_token": ONE, "head_dist.bias": ONE}, "a distillation token"),
    "registers": (lambda s: s | {"reg_token": ONE}, "register tokens"),
    "the original's registers": (lambda s: s | {"register_tokens": ONE}, "register tokens"),
    "CLIP": (lambda s: s | {"norm_pre.weight": ONE}, "a norm before the first block"),
    "SigLIP": (lambda s: s | {"attn_pool.q.weight": ONE}, "pooling by attention"),
    "norms of queries": (lambda s: s | {"blocks.0.attn.q_norm.weight": ONE}, "norms of queries and keys"),
    "rotary": (lambda s: {n: t for n, t in s.items() if n != "pos_embed"}, "no pos_embed"),
    "Eva of timm": (lambda s: s | {"blocks.0.gamma_1": ONE}, "rotary or relative positions"),
    "no class token": (lambda s: {n: t for n, t in s.items() if n != "cls_token"}, "no cls_token"),
    "one norm": (lambda s: s | {"blocks.0.attn.norm.weight": ONE}, "a norm in attention and in the MLP"),
    "gated": (lambda s: s | {"blocks.0.mlp.w12.weight": ONE}, "a gated MLP"),
    "SAM": (lambda s: s | {"blocks.0.attn.rel_pos_h": ONE}, "attention of another kind"),
    "a hybrid": (lambda s: s | {"patch_embed.backbone.conv.weight": ONE}, "another embedding of patches"),
    "no biases of layers": (lambda s: {n: t for n, t in s.items() if "proj.bias" not in n}, "layers without biases"),
    "RMSNorm": (lambda s: {n: t for n, t in s.items() if "norm1.bias" not in n}, "norms without biases"),
    "InternViT": (lambda s: {n: t for n, t in s.items() if not n.startswith("norm.")}, "no norm after the last block"),
    "no biases": (lambda s: {n: t for n, t in s.items() if "qkv.bias" not in n}, "attention without biases"),
}


@pytest.mark.parametrize(("change", "words"), ADDED.values(), ids=ADDED)
def test_what_other_vits_add_is_refused_by_name(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], words: str, tmp_path: Path
) -> None:
    save_file(change(load_file(FOREIGN / "vit/deit/model.safetensors")), tmp_path / "vit.safetensors")
    with pytest.raises(BeitJaxError, match=words) as caught:
        plan(resolve(tmp_path / "vit.safetensors"), TWO)
    assert "\n" not in str(caught.value) and "config.json" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "vit_base_patch16_clip_quickgelu_224"),
        ({"architecture": "eva02_enormous_patch14_clip_224"}, "its norms follow"),
        ({"model_args": {"global_pool": "avg"}}, "global_pool avg"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer relu"),
        ({"model_args": {"pool_include_prefix": True}}, "pool_include_prefix True"),
    ],
)
def test_what_timm_s_config_says_of_another_function_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    content = json.loads((FOREIGN / "vit/deit/config.json").read_text())
    merged = content | changes | {"model_args": content["model_args"] | changes.get("model_args", {})}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    (tmp_path / "model.safetensors").write_bytes((FOREIGN / "vit/deit/model.safetensors").read_bytes())
    with pytest.raises(BeitJaxError, match=words):
        plan(resolve(tmp_path))


def test_heads_of_small_vits_are_not_guessed(tmp_path: Path) -> None:
    """MoCo v3's small ViT has the sizes of DeiT's, and twice its heads."""
    with pytest.raises(BeitJaxError, match="--num-heads"):
        plan(resolve(FOREIGN / "originals/mae_classifier.pth"))
