"""Every format a BEiT is published in becomes the same parameters as the Hugging Face directory of the same model."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import original
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from tolerances import MODEL

from beit_jax.config import BeitConfig
from beit_jax.convert import Options, load, plan
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.published import PUBLISHED
from beit_jax.tree import unflatten
from beit_jax.variants import VARIANTS

MODELS = {
    "pre-training": ("masked_image_modeling", reference.BIAS["shared"] | {"use_mask_token": True}),
    "fine-tuned": ("image_classification", reference.BIAS["per_layer"] | {"num_labels": 5}),
    "fine-tuned, shared table": ("image_classification", reference.BIAS["shared"] | {"num_labels": 5}),
    "fine-tuned, both tables": ("image_classification", reference.BIAS["both"] | {"num_labels": 5}),
    "class token": ("image_classification", reference.BIAS["per_layer"] | {"use_mean_pooling": False, "num_labels": 3}),
    "absolute positions": (
        "masked_image_modeling",
        {"use_absolute_position_embeddings": True, "use_mask_token": True, "layer_scale_init_value": 0.0},
    ),
    "encoder": ("features", reference.BIAS["shared"] | {"use_mean_pooling": False}),
}
WIDE = reference.TINY | {"hidden_size": 128, "num_attention_heads": 2}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], BeitConfig]:
    """Tensors under transformers' names, the parameters they become, and the configuration."""
    task, options = MODELS[request.param]
    directory = reference.save(reference.random_model(task=task, **WIDE | options), tmp_path / "hf")
    checkpoint = load(resolve(directory))
    return load_file(directory / "model.safetensors"), checkpoint.params, checkpoint.config


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def recognisable(config: BeitConfig) -> BeitConfig:
    """Returns the configuration as far as names and shapes can tell it."""
    return replace(
        config,
        layer_norm_eps=1e-6,
        position_resize="geometric",
        labels=tuple(f"LABEL_{i}" for i in range(config.num_labels)),
        add_pooling_layer="pooler" in config.task
        or (config.task == "image_classification" and config.pooling == "mean"),
        vocab_size=config.vocab_size if config.task == "masked_image_modeling" else 8192,
        drop_path_rate=0.1,
    )


def test_original_file_is_recognised(case: Any, tmp_path: Path) -> None:
    files, params, config = case
    path = tmp_path / "checkpoint.pth"
    torch.save(original.training_file(original.original_names(files, indices=True)), path)
    options = Options(num_heads=2 if config.position_bias == "none" else None)
    decided = plan(resolve(path), options)
    assert decided.config == recognisable(config)
    assert_same(load(resolve(path), options).params, params)
    assert any("args" in note for note in decided.notes)
    assert decided.checkpoint.metadata["args"]["model"] == "beit_base_patch16_224"
    assert all(name.endswith("relative_position_index") for name in decided.dropped)


def test_timm_directory(case: Any, tmp_path: Path) -> None:
    files, params, config = case
    save_file(original.original_names(files), tmp_path / "model.safetensors")
    statistics = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    pretrained = statistics | {"crop_pct": 0.95, "interpolation": "bicubic"}
    content = {"architecture": "beitv2_large_patch16_224", "num_classes": 5, "pretrained_cfg": pretrained}
    if config.position_bias == "none":
        content["model_args"] = {"num_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(content))
    decided = plan(resolve(tmp_path))
    assert decided.config == replace(recognisable(config), position_resize="geometric_linear")
    assert decided.processor.mean == (0.485, 0.456, 0.406)
    assert (decided.processor.resize, decided.processor.crop) == (int(32 / 0.95), (32, 32))
    assert_same(load(resolve(tmp_path)).params, params)


def test_flax_msgpack_of_transformers_4(case: Any, tmp_path: Path) -> None:
    files, params, config = case
    original.save_msgpack(files, tmp_path / "flax_model.msgpack")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert_same(load(resolve(tmp_path)).params, params)


def test_deepspeed_file_is_widened(tmp_path: Path) -> None:
    """data2vec's fine-tuned files: float16 under "module", beside DeepSpeed's own entries."""
    model = reference.random_model(num_labels=3, **reference.TINY, **reference.BIAS["shared"])
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    half = {name: tensor.half() for name, tensor in original.original_names(files).items()}
    content = {"module": half, "ds_config": {"train_batch_size": 1}, "global_steps": 5, "csr_tensor_module_names": []}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    checkpoint = load(resolve(tmp_path / "mp_rank_00_model_states.pt"))
    kernel = half["blocks.1.mlp.fc1.weight"].float().numpy().T
    assert np.array_equal(checkpoint.params["beit/blocks/mlp/fc1/kernel"][1], kernel)
    assert checkpoint.config.position_bias == "shared" and checkpoint.config.pooling == "mean"


def test_teacher_or_student(tmp_path: Path) -> None:
    """data2vec pre-training files hold both; nothing is chosen silently."""
    model = reference.random_model(
        task="masked_image_modeling", **WIDE | {"vocab_size": 128, "use_mask_token": True}, **reference.BIAS["shared"]
    )
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    student = original.original_names(files)
    teacher = {name: tensor + 1 for name, tensor in student.items()}
    path = tmp_path / "checkpoint-799.pth"
    torch.save(original.training_file(student, model_ema=teacher), path)
    with pytest.raises(BeitJaxError, match=r"holds weights under 'model' and 'model_ema': choose one.*--weights"):
        plan(resolve(path))
    for weights, tensors in (("model", student), ("ema", teacher)):
        checkpoint = load(resolve(path), Options(weights=weights))
        assert np.array_equal(checkpoint.params["lm_head/bias"], tensors["lm_head.bias"])
        assert checkpoint.config.model_type == "data2vec-vision"
        assert checkpoint.provenance["options"] == {"weights": weights}


def aggregated(tmp_path: Path, bias: str = "shared") -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """BEiT v2's state dict with two extra blocks, copies of the encoder's shifted by one, and what they become."""
    options = reference.TINY | reference.BIAS[bias] | {"use_mask_token": True}
    model = reference.random_model(task="masked_image_modeling", **options)
    directory = reference.save(model, tmp_path / "hf")
    state = original.original_names(load_file(directory / "model.safetensors"))
    extra = {n.replace("blocks.", "cls_pt_layers."): t + 1 for n, t in state.items() if n.startswith("blocks.")}
    params = load(resolve(directory)).params
    blocks = {n.replace("beit/", "aggregation/"): leaf + 1 for n, leaf in params.items() if n.startswith("beit/blocks")}
    return state | extra, params | blocks


@pytest.mark.parametrize("bias", ["shared", "both"])
def test_patch_aggregation_of_beit_v2(tmp_path: Path, bias: str) -> None:
    """Wrapped twice, as in its files; the arguments of its training say the block (early_layers)."""
    state, params = aggregated(tmp_path, bias)
    arguments = argparse.Namespace(model="beit_base_patch16_224_8k_vocab_cls_pt", early_layers=1, head_layers=2)
    torch.save({"model": {"module": state}, "args": arguments}, tmp_path / "v2.pth")
    checkpoint = load(resolve(tmp_path / "v2.pth"))
    assert (checkpoint.config.aggregate_from, checkpoint.config.aggregation_layers) == (1, 2)
    assert_same(checkpoint.params, params)


def test_patch_aggregation_by_option(tmp_path: Path) -> None:
    state, params = aggregated(tmp_path)
    torch.save({"model": state}, tmp_path / "v2.pth")
    with pytest.raises(
        BeitJaxError, match=r"2 cls_pt_layers read \(early_layers, 1 to 2\), found nothing.*--aggregate"
    ):
        plan(resolve(tmp_path / "v2.pth"))
    assert_same(load(resolve(tmp_path / "v2.pth"), Options(aggregate_from=2)).params, params)
    left = plan(resolve(tmp_path / "v2.pth"), Options(aggregate_from=0))
    assert left.config.aggregation_layers == 0
    assert set(left.dropped) == {name for name in state if name.startswith("cls_pt_layers.")}
    assert any(note.endswith(f"left out: cls_pt_layers ({len(left.dropped)})") for note in left.notes)


@pytest.mark.parametrize(
    "entries", [{"config": {"early_layers": 2}}, {"hyper_parameters": {"model": {"early_layers": "2"}}}, {"args": {}}]
)
def test_patch_aggregation_beside_a_configuration(tmp_path: Path, entries: dict[str, Any]) -> None:
    """transformers' config.json has no word for these blocks: what the file, or the user, says of them counts."""
    state, params = aggregated(tmp_path)
    torch.save({"model": state} | entries, tmp_path / "hf" / "v2.pth")
    options = Options(aggregate_from=2) if entries == {"args": {}} else Options()
    checkpoint = load(resolve(tmp_path / "hf" / "v2.pth"), options)
    assert (checkpoint.config.aggregate_from, checkpoint.config.aggregation_layers) == (2, 2)
    assert_same(checkpoint.params, params)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["beit_jax"] = {"aggregate_from": 2, "aggregation_layers": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BeitJaxError, match=r"aggregation_layers: expected 2.*found 1"):
        plan(resolve(tmp_path / "hf" / "v2.pth"))


@pytest.mark.parametrize(
    ("bias", "change"), [("per_layer", {"image_size": 48}), ("shared", {"position_bias": "per_layer"})]
)
def test_patch_aggregation_of_another_size(tmp_path: Path, bias: str, change: dict[str, Any]) -> None:
    """The extra blocks' tables change as the encoder's do."""
    state, _ = aggregated(tmp_path, bias)
    torch.save({"model": state}, tmp_path / "v2.pth")
    params = load(resolve(tmp_path / "v2.pth"), Options(aggregate_from=1, **change)).params
    tables = [params[f"{part}/blocks/attention/bias_table"] for part in ("beit", "aggregation")]
    shift = 1 if bias == "per_layer" else 0  # the copies of the encoder's blocks are shifted by one
    np.testing.assert_allclose(tables[1], tables[0] + shift, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["v2.pth", "hf/v2.pth"])  # beside transformers' config.json, which has no word for it
def test_aggregation_with_a_head_of_its_own(tmp_path: Path, where: str) -> None:
    """--shared_lm_head False has a second norm and head, which are read, or left out whole with the extra blocks."""
    state, params = aggregated(tmp_path)
    own = {f"cls_pt_{name}": tensor + 1 for name, tensor in state.items() if name.startswith(("norm.", "lm_head."))}
    assert len(own) == 4
    torch.save({"model": state | own, "early_layers": 1}, tmp_path / where)
    checkpoint = load(resolve(tmp_path / where))
    assert checkpoint.config.own_aggregation_head
    heads = {f"aggregation/{n}": leaf + 1 for n, leaf in params.items() if n.startswith(("norm/", "lm_head/"))}
    assert_same(checkpoint.params, params | heads)
    left = plan(resolve(tmp_path / where), Options(aggregate_from=0))
    assert not left.config.own_aggregation_head and set(own) < set(left.dropped)
    torch.save({"model": {n: t for n, t in (state | own).items() if n != "cls_pt_norm.bias"}, "early_layers": 1},
               tmp_path / where)  # fmt: skip
    with pytest.raises(BeitJaxError, match=r"1 tensor missing: cls_pt_norm\.bias"):
        plan(resolve(tmp_path / where))


@pytest.mark.parametrize("prefix", ["pretrained.model.", "backbone."])
def test_encoder_inside_another_models_file(tmp_path: Path, prefix: str) -> None:
    """MiDaS keeps timm's BEiT under ``pretrained.model.``, mmseg under ``backbone.``."""
    model = reference.random_model(task="features", **reference.TINY, **reference.BIAS["per_layer"])
    directory = reference.save(model, tmp_path / "hf")
    state = original.original_names(load_file(directory / "model.safetensors"))
    host = {prefix + name: tensor for name, tensor in state.items()} | {"scratch.conv.weight": torch.zeros(3)}
    torch.save(host, tmp_path / "dpt_beit.pt")
    decided = plan(resolve(tmp_path / "dpt_beit.pt"))
    assert decided.dropped == ("scratch.conv.weight",)
    assert_same(load(resolve(tmp_path / "dpt_beit.pt")).params, load(resolve(directory)).params)


def test_encoder_inside_a_transformers_dpt(tmp_path: Path) -> None:
    """Intel/dpt-beit-*: a depth model whose backbone is a BEiT; its feature maps are our hidden states."""
    import transformers

    backbone = transformers.BeitConfig(
        **reference.TINY | {"num_hidden_layers": 4}, use_relative_position_bias=True, reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DPTConfig(backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)
    model = transformers.DPTForDepthEstimation(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path)
    checkpoint = load(resolve(tmp_path))
    assert checkpoint.config.task == "features" and not checkpoint.config.has_pooler
    pixel_values = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    ours = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    states = ours(pixel_values, output_hidden_states=True).hidden_states
    with torch.no_grad():
        expected = model.backbone(reference.to_torch(pixel_values)).feature_maps
    for stage, feature_map in enumerate(expected, start=1):
        assert_allclose(states[stage], feature_map, rtol=0.0, atol=MODEL)


def test_optimizer_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-training file is two thirds optimizer state; what is read is the weights and the small records."""
    from beit_jax.convert.files.weight_file import RandomAccessFile

    model = reference.random_model(**reference.TINY, **reference.BIAS["shared"])
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    state = original.original_names(files)
    optimizer = {"state": {i: {"exp_avg": torch.zeros(1_000_000)} for i in range(4)}}
    path = tmp_path / "big.pth"
    torch.save(original.training_file(state, optimizer=optimizer), path)
    done = []
    read_into = RandomAccessFile.read_into

    def counted(self: RandomAccessFile, offset: int, buffer: memoryview, what: str) -> None:
        done.append(len(buffer))
        read_into(self, offset, buffer, what)

    monkeypatch.setattr(RandomAccessFile, "read_into", counted)
    load(resolve(path))
    weights = sum(tensor.nbytes for tensor in state.values())
    assert path.stat().st_size > 16_000_000
    assert weights <= sum(done) < weights + 500_000


def test_a_named_variant_must_fit(tmp_path: Path) -> None:
    model = reference.random_model(**reference.TINY)
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    torch.save(original.original_names(files), tmp_path / "c.pth")
    with pytest.raises(BeitJaxError, match=r"The file has 2 layers, num_hidden_layers says 12.*--variant"):
        plan(resolve(tmp_path / "c.pth"), Options(variant="beit_base_patch16_224"))
    with pytest.raises(BeitJaxError, match=r"--variant beit_huge: .*expected one of beit_base_patch16_224_pt22k,"):
        plan(resolve(tmp_path / "c.pth"), Options(variant="beit_huge"))


def test_damaged_msgpack_is_one_line(tmp_path: Path) -> None:
    model = reference.random_model(**reference.TINY)
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    original.save_msgpack(files, tmp_path / "flax_model.msgpack")
    data = (tmp_path / "flax_model.msgpack").read_bytes()
    for damaged in (data[: len(data) // 2], data[:-1], data + b"\0", b"\x81\xa1a\xc1", b"\x81\xa1a\x01"):
        (tmp_path / "flax_model.msgpack").write_bytes(damaged)
        with pytest.raises(BeitJaxError) as error:
            plan(resolve(tmp_path / "flax_model.msgpack"))
        assert "flax_model.msgpack" in str(error.value) and "\n" not in str(error.value)


def test_published_table_is_consistent() -> None:
    assert len({row.name for row in PUBLISHED}) == len(PUBLISHED) == 68
    assert {row.variant for row in PUBLISHED} - {None} == set(VARIANTS)
