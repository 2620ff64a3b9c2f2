"""Where training starts: draws against torch's own, and checkpoints against the converter's reading of them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from forward import logits_of
from scipy.stats import ks_2samp
from virtual import xla_flags

from beit_jax.config import BeitConfig
from beit_jax.convert import Options, load
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.images import ImageProcessor
from beit_jax.models.build import param_shapes, statistics
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.tokenizers.configs import DvaeEncoderConfig
from beit_jax.train.initial.parameters import Scheme, from_checkpoint, initial_params
from beit_jax.train.objectives.masked_tokens import MaskedTokens, MaskedTokensRecipe, TokenOptions
from beit_jax.train.objectives.objective import Sources
from beit_jax.train.recipe import MaskOptions
from beit_jax.tree import flatten
from beit_jax.variants import VARIANTS
from beit_jax.weights import NativeCheckpoint

TINY = BeitConfig(
    task="image_classification",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=96,
    position_bias="per_layer",
    position_resize="geometric",
    labels=tuple("abcdefg"),
)
MASKED = replace(TINY, task="masked_image_modeling", position_bias="shared", use_mask_token=True, vocab_size=40)
SEGMENTS = replace(
    TINY, task="semantic_segmentation", out_indices=(0, 1, 2, 3), auxiliary_channels=24, auxiliary_concat_input=True
)
BACKBONE = replace(TINY, task="backbone", out_indices=(0, 1, 2, 3), add_fpn=True)
AGGREGATING = replace(MASKED, aggregate_from=2, aggregation_layers=2)
FEATURES = replace(TINY, task="features", position_bias="shared", pooling="cls", labels=())
CONFIGS = {
    "classification": TINY,
    "classification by class token": replace(TINY, pooling="cls", use_absolute_position_embeddings=True),
    "masked": replace(MASKED, position_bias="both", use_absolute_position_embeddings=True),
    "aggregating": AGGREGATING,
    "segmentation": SEGMENTS,
    "backbone": BACKBONE,
    "features": FEATURES,
}
KEY = jax.random.key(3)


# --- Drawn ------------------------------------------------------------------------------------------------------------

Sample = Callable[[], torch.Tensor]
COUNT = 40_000


def cut_normal(std: float, cut: float) -> torch.Tensor:
    return torch.nn.init.trunc_normal_(torch.empty(COUNT), std=std, a=-cut, b=cut)


def loose() -> torch.Tensor:
    """timm's trunc_normal_ with its default bounds."""
    return cut_normal(0.02, 2.0)


def tight() -> torch.Tensor:
    return cut_normal(0.02, 0.02)


def kaiming(side: int, inputs: int, outputs: int) -> torch.Tensor:
    """mmcv's ConvModule."""
    kernel = torch.empty(outputs, inputs, side, side)
    return torch.nn.init.kaiming_normal_(kernel, a=0, mode="fan_out", nonlinearity="relu")


def conv_default() -> torch.nn.Conv2d:
    return torch.nn.Conv2d(3, 512, 8, 8)


def transposed_default() -> torch.nn.ConvTranspose2d:
    return torch.nn.ConvTranspose2d(64, 64, 2, 2)


ENCODER: Mapping[Scheme, Mapping[str, Sample]] = {
    "finetune": {
        "beit/embeddings/patch_kernel": lambda: conv_default().weight,
        "beit/embeddings/patch_bias": lambda: conv_default().bias,
        "beit/blocks/attention/qkv_kernel": loose,
        "beit/blocks/mlp/fc1/kernel": loose,
        "beit/embeddings/cls_token": loose,
    },
    "pretrain": {
        "beit/embeddings/patch_kernel": tight,
        "beit/blocks/attention/qkv_kernel": tight,
        "beit/blocks/mlp/fc1/kernel": tight,
        "beit/embeddings/cls_token": tight,
    },
}
CASES: Mapping[tuple[str, Scheme], Mapping[str, Sample]] = {
    ("classification", "finetune"): ENCODER["finetune"] | {"classifier/kernel": lambda: 0.001 * loose()},
    ("classification by class token", "finetune"): ENCODER["finetune"] | {"beit/embeddings/position_embeddings": loose},
    ("masked", "pretrain"): ENCODER["pretrain"]
    | {
        "lm_head/kernel": tight,
        "beit/embeddings/mask_token": tight,
        "beit/embeddings/position_embeddings": tight,
    },
    ("aggregating", "pretrain"): ENCODER["pretrain"]
    | {
        "lm_head/kernel": tight,
        "aggregation/blocks/attention/qkv_kernel": tight,
        "aggregation/blocks/mlp/fc1/kernel": tight,
    },
    ("segmentation", "finetune"): ENCODER["finetune"]
    | {
        "fpn/up4_first/kernel": lambda: transposed_default().weight,
        "fpn/up4_first/bias": lambda: transposed_default().bias,
        "fpn/up4_second/kernel": lambda: transposed_default().weight,
        "fpn/up2/bias": lambda: transposed_default().bias,
        "decode_head/classifier/kernel": lambda: 0.01 * torch.randn(COUNT),
        "auxiliary_head/classifier/kernel": lambda: 0.01 * torch.randn(COUNT),
        "decode_head/lateral_1/kernel": lambda: kaiming(1, 64, 64),
        "decode_head/bottleneck/kernel": lambda: kaiming(3, 320, 64),
        "decode_head/fuse/kernel": lambda: kaiming(3, 256, 64),
        "auxiliary_head/conv_0/kernel": lambda: kaiming(3, 64, 24),
        "auxiliary_head/concat/kernel": lambda: kaiming(3, 88, 24),
    },
}
NOT_ZERO = r".*(kernel|token|position_embeddings|scale|var|gamma_[12])|fpn/(up4_first|up4_second|up2)/bias"


def drawn(config: BeitConfig, scheme: Scheme, key: jax.Array = KEY) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(initial_params(config, scheme, key)).items()}


def same_distribution(found: np.ndarray, expected: torch.Tensor) -> bool:
    return ks_2samp(found.ravel(), expected.detach().numpy().ravel(), method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_draws_are_distributed_as_torch_draws_them(case: tuple[str, Scheme]) -> None:
    name, scheme = case
    torch.manual_seed(0)
    found = drawn(CONFIGS[name], scheme)
    for leaf, sample in CASES[case].items():
        assert same_distribution(found[leaf], sample()), leaf


@pytest.mark.parametrize(("scheme", "sample"), [("finetune", loose), ("pretrain", tight)])
def test_last_matrices_of_the_branches_shrink_with_depth(scheme: Scheme, sample: Sample) -> None:
    torch.manual_seed(0)
    found = drawn(CONFIGS["masked"] if scheme == "pretrain" else TINY, scheme)
    for name in ("beit/blocks/attention/out_kernel", "beit/blocks/mlp/fc2/kernel"):
        for layer in range(TINY.num_hidden_layers):
            expected = sample().div_((2.0 * (layer + 1)) ** 0.5)
            assert same_distribution(found[name][layer], expected), (name, layer)


def test_aggregation_layers_count_from_the_early_block() -> None:
    """unilm beit2/modeling_pretrain.py: layer j after block 2 is divided by sqrt(2 (2 + j + 1)), j from 0."""
    torch.manual_seed(0)
    found = drawn(AGGREGATING, "pretrain")
    for name in ("attention/out_kernel", "mlp/fc2/kernel"):
        for j in range(2):
            expected = tight().div_((2.0 * (2 + j + 1)) ** 0.5)
            assert same_distribution(found[f"aggregation/blocks/{name}"][j], expected), (name, j)


def test_pretraining_cuts_at_one_standard_deviation_and_finetuning_does_not() -> None:
    name = "beit/blocks/attention/qkv_kernel"
    assert 0.0199 < np.abs(drawn(MASKED, "pretrain")[name]).max() <= 0.02
    assert np.abs(drawn(MASKED, "finetune")[name]).max() > 0.06


@pytest.mark.parametrize("scheme", ["finetune", "pretrain"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_and_statistic_has_its_value(name: str, scheme: Scheme) -> None:
    config = replace(CONFIGS[name], layer_scale_init_value=0.1)
    found = drawn(config, scheme)
    assert {leaf: value.shape for leaf, value in found.items()} == dict(param_shapes(config))
    assert all(value.dtype == np.float32 for value in found.values())
    for leaf, value in found.items():
        if leaf.endswith(("scale", "var")):
            assert (value == 1.0).all(), leaf
        elif "gamma" in leaf:
            assert (value == np.float32(0.1)).all(), leaf
        elif scheme == "finetune" and leaf.endswith("patch_bias"):
            assert (value != 0.0).all(), leaf
        else:
            assert (value != 0.0).all() == bool(re.fullmatch(NOT_ZERO, leaf)), leaf
            assert (value == 0.0).all() != bool(re.fullmatch(NOT_ZERO, leaf)), leaf
    assert set(statistics(config)) <= found.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_be_initialised(name: str) -> None:
    config = VARIANTS[name]
    for scheme in ("finetune", "pretrain"):
        shapes = jax.eval_shape(lambda key, scheme=scheme: initial_params(config, scheme, key), KEY)
        assert {leaf: value.shape for leaf, value in flatten(shapes).items()} == dict(param_shapes(config))


def test_a_leaf_depends_on_the_key_and_its_name_alone() -> None:
    first, again, other = drawn(TINY, "finetune"), drawn(TINY, "finetune"), drawn(TINY, "finetune", jax.random.key(4))
    encoder = drawn(replace(FEATURES, position_bias="per_layer"), "finetune")
    random = [name for name in first if re.fullmatch(r".*(kernel|token|patch_bias)", name)]
    for name in random:
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
        if name.startswith("beit/"):
            assert np.array_equal(first[name], encoder[name.removeprefix("beit/")])
    starts = [first[name].ravel()[:8] / np.abs(first[name].ravel()[:8]).max() for name in random]
    assert all(not np.allclose(a, b, atol=1e-2) for i, a in enumerate(starts) for b in starts[:i])


SHARDED = """
import sys
from functools import partial
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from beit_jax.config import BeitConfig
from beit_jax.train.initial.parameters import initial_params
from beit_jax.tree import flatten
draw = partial(initial_params, BeitConfig.from_hf(eval(sys.argv[1])), "finetune")
split, whole = (NamedSharding(jax.make_mesh((2,), ("fsdp",)), PartitionSpec(*spec)) for spec in ((None, "fsdp"), ()))
shardings = jax.tree.map(lambda leaf: split if leaf.ndim == 3 and leaf.shape[1] % 2 == 0 else whole,
                         jax.eval_shape(draw, jax.random.key(3)))
params = flatten(jax.jit(draw, out_shardings=shardings)(jax.random.key(3)))
assert params["beit/blocks/mlp/fc1/kernel"].addressable_shards[0].data.shape == (4, 32, 96)
np.savez(sys.argv[2], **{name.replace("/", "|"): leaf for name, leaf in params.items()})
"""


def test_drawn_in_shards_it_is_the_same(tmp_path: Path) -> None:
    """To float32 rounding: a compiled program may merge a scale with the division by depth."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(2), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, repr(TINY.to_hf()), str(tmp_path / "drawn.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "drawn.npz") as found:
        for name, expected in drawn(TINY, "finetune").items():
            np.testing.assert_allclose(found[name.replace("/", "|")], expected, rtol=1e-6, atol=0, err_msg=name)


# --- From a checkpoint ------------------------------------------------------------------------------------------------


def random_checkpoint(config: BeitConfig, dtype: type = np.float32, seed: int = 0) -> NativeCheckpoint:
    """Every tensor away from where training would start it."""
    rng = np.random.default_rng(seed)
    params = {name: (1 + rng.random(shape)).astype(dtype) for name, shape in param_shapes(config).items()}
    return NativeCheckpoint(config, ImageProcessor(), params)


def start(
    checkpoint: NativeCheckpoint, target: BeitConfig
) -> tuple[dict[str, np.ndarray], tuple[tuple[str, ...], ...]]:
    params, report = from_checkpoint(checkpoint, target, KEY)
    flat = flatten(params)
    assert {name: leaf.shape for name, leaf in flat.items()} == dict(param_shapes(target))
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in flat.values())
    return flat, (report.adapted, report.dropped, report.drawn)


TABLES = ("beit/blocks/attention/bias_table",)
CLASSIFIER = ("classifier/bias", "classifier/kernel")
POOLER = ("beit/pooler_norm/bias", "beit/pooler_norm/scale")
MASKED_ONLY = ("beit/embeddings/mask_token", "lm_head/bias", "lm_head/kernel", "norm/bias", "norm/scale")


@pytest.mark.parametrize("method", ["geometric", "bilinear"])
@pytest.mark.parametrize("size", [32, 48])
def test_the_encoder_of_a_pretrained_model_is_what_the_converter_reads(tmp_path: Path, size: int, method: str) -> None:
    theirs = reference.random_model(
        task="masked_image_modeling", **reference.TINY | reference.BIAS["shared"] | {"use_mask_token": True}
    )
    source = resolve(reference.save(theirs, tmp_path / "hf"))
    converted = load(source, Options(position_bias="per_layer", image_size=size, position_resize=method))
    target = replace(
        converted.config, task="image_classification", labels=("cat", "dog"), use_mask_token=False, pooling="mean"
    )
    found, report = start(load(source), target)
    encoder = [name for name in found if name.startswith("beit/") and "pooler" not in name]
    for name in encoder:
        assert np.array_equal(found[name], converted.params[name]), name
    assert len(encoder) == len([name for name in converted.params if name.startswith("beit/")]) - 1  # the mask token
    if size == 32:  # every layer begins with the table itself
        (table,) = (value.numpy() for name, value in theirs.state_dict().items() if name.endswith("bias_table"))
        assert all(np.array_equal(layer, table) for layer in found[TABLES[0]])
    assert (found["beit/pooler_norm/scale"] == 1).all() and (found["beit/pooler_norm/bias"] == 0).all()
    assert 1e-5 < found["classifier/kernel"].std() < 4e-5 and (found["classifier/bias"] == 0).all()
    assert report == (TABLES, MASKED_ONLY, POOLER + CLASSIFIER)


def test_every_tensor_of_the_checkpoint_counts_unless_it_is_named_as_dropped() -> None:
    checkpoint = random_checkpoint(MASKED)
    before, (_, dropped, _) = start(checkpoint, replace(TINY, image_size=(48, 48)))
    for name, leaf in checkpoint.params.items():
        changed = replace(checkpoint, params=checkpoint.params | {name: leaf + 1})
        after, _ = start(changed, replace(TINY, image_size=(48, 48)))
        differs = any(not np.array_equal(before[leaf], after[leaf]) for leaf in before)
        assert differs == (name not in dropped), name


def test_the_same_classes_keep_everything() -> None:
    checkpoint = random_checkpoint(TINY)
    found, report = start(checkpoint, TINY)
    assert all(np.array_equal(found[name], leaf) for name, leaf in checkpoint.params.items())
    assert report == ((), (), ())
    pixels = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    assert np.array_equal(*(logits_of(TINY, params, pixels) for params in (found, checkpoint.params)))


def test_other_classes_keep_the_norm_and_draw_the_classifier() -> None:
    for labels in (tuple("ABCDEFG"), ("a", "b")):
        checkpoint = random_checkpoint(TINY)
        found, report = start(checkpoint, replace(TINY, labels=labels))
        assert report == ((), CLASSIFIER, CLASSIFIER)
        assert all(np.array_equal(found[name], checkpoint.params[name]) for name in POOLER)
        assert np.abs(found["classifier/kernel"]).max() < 1e-3
    again, _ = start(random_checkpoint(MASKED), TINY)
    assert np.array_equal(again["classifier/kernel"], drawn(TINY, "finetune")["classifier/kernel"])


def test_another_pooling_starts_its_norm_and_the_classifier_anew() -> None:
    by_token = replace(TINY, pooling="cls")
    norm = ("beit/norm/bias", "beit/norm/scale")
    assert start(random_checkpoint(TINY), by_token)[1] == ((), POOLER + CLASSIFIER, norm + CLASSIFIER)
    assert start(random_checkpoint(by_token), TINY)[1] == ((), norm + CLASSIFIER, POOLER + CLASSIFIER)


def test_the_norm_before_the_masked_head_is_the_final_norm_of_a_model_of_the_class_token() -> None:
    checkpoint = random_checkpoint(MASKED)
    found, (_, dropped, new) = start(checkpoint, replace(TINY, pooling="cls"))
    assert np.array_equal(found["beit/norm/scale"], checkpoint.params["norm/scale"])
    assert np.array_equal(found["beit/norm/bias"], checkpoint.params["norm/bias"])
    assert dropped == ("beit/embeddings/mask_token", "lm_head/bias", "lm_head/kernel") and new == CLASSIFIER


def test_an_encoder_of_its_own_has_bare_names() -> None:
    checkpoint = random_checkpoint(FEATURES)
    norm = ("beit/norm/bias", "beit/norm/scale")
    found, report = start(checkpoint, TINY)
    assert report == (TABLES, norm, POOLER + CLASSIFIER)
    assert np.array_equal(found["beit/blocks/mlp/fc1/kernel"], checkpoint.params["blocks/mlp/fc1/kernel"])
    by_token = replace(TINY, pooling="cls", position_bias="shared", image_size=(48, 48))
    found, report = start(checkpoint, by_token)
    assert report == (("beit/shared_bias_table",), (), CLASSIFIER)
    assert np.array_equal(found["beit/norm/scale"], checkpoint.params["norm/scale"])
    found, report = start(random_checkpoint(MASKED), FEATURES)  # and back
    assert "norm/scale" in found and report[2] == ()


def test_a_segmentation_model_starts_from_an_encoder() -> None:
    found, (_, dropped, new) = start(random_checkpoint(MASKED), SEGMENTS)
    assert dropped == MASKED_ONLY and all(not name.startswith("beit/") for name in new)
    assert statistics(SEGMENTS) < set(new)
    assert all((found[name] == (1 if name.endswith("var") else 0)).all() for name in statistics(SEGMENTS))
    found, (_, dropped, new) = start(random_checkpoint(SEGMENTS), replace(SEGMENTS, labels=("sky", "sea")))
    classifiers = {f"{head}_head/classifier/{leaf}" for head in ("decode", "auxiliary") for leaf in ("kernel", "bias")}
    assert set(dropped) == set(new) == classifiers


def test_pretraining_goes_on_with_its_head_and_mask_token() -> None:
    checkpoint = random_checkpoint(MASKED)
    assert start(checkpoint, MASKED)[1] == ((), (), ())
    found, report = start(checkpoint, replace(MASKED, vocab_size=41))
    assert report == ((), ("lm_head/bias", "lm_head/kernel"), ("lm_head/bias", "lm_head/kernel"))
    assert np.abs(found["lm_head/kernel"]).max() <= 0.02  # drawn as pre-training draws


def test_pretraining_with_aggregation_layers_starts_from_a_checkpoint() -> None:
    """One without such layers: they start new, numbered by their depth. One with them: everything is kept."""
    checkpoint = random_checkpoint(MASKED)
    found, (adapted, dropped, new) = start(checkpoint, AGGREGATING)
    assert (adapted, dropped) == ((), ())
    assert new and set(new) == {name for name in found if name.startswith("aggregation/")}
    assert all(np.array_equal(found[name], leaf) for name, leaf in checkpoint.params.items())
    fresh = drawn(AGGREGATING, "pretrain")
    assert all(np.array_equal(found[name], fresh[name]) for name in new)
    assert start(random_checkpoint(AGGREGATING), AGGREGATING)[1] == ((), (), ())


def test_pretraining_goes_on_with_both_of_its_heads() -> None:
    """The head of the aggregation layers is the checkpoint's, unless the recipe says otherwise; one for other tokens is
    drawn, and so is one that the checkpoint does not have."""
    own = replace(AGGREGATING, own_aggregation_head=True)
    heads = {name for name in param_shapes(own) if name.startswith("aggregation/") and "/blocks/" not in name}
    assert len(heads) == 4
    checkpoint = random_checkpoint(own)
    found, report = start(checkpoint, own)
    assert report == ((), (), ()) and all(np.array_equal(found[name], checkpoint.params[name]) for name in heads)
    assert set(start(random_checkpoint(AGGREGATING), own)[1][2]) == heads
    assert set(start(checkpoint, AGGREGATING)[1][1]) == heads
    both = tuple(f"{part}lm_head/{leaf}" for part in ("aggregation/", "") for leaf in ("bias", "kernel"))
    assert start(checkpoint, replace(own, vocab_size=41))[1] == ((), both, both)

    tokenizer = TokenizerCheckpoint(DvaeEncoderConfig(vocab_size=own.vocab_size), {})
    sources, mask = Sources(tokenizer=tokenizer, start=checkpoint), MaskOptions(patches=6, min_block=2)
    for stated, expected in ((None, True), (True, True), (False, False)):
        tokens = TokenOptions(aggregate_from=2, aggregation_layers=2, own_head=stated)
        recipe = MaskedTokensRecipe("test", tokens=tokens, mask=mask)
        assert MaskedTokens.configure(recipe, (), sources).own_aggregation_head is expected
    plain = MaskedTokensRecipe("test", mask=mask)
    assert not MaskedTokens.configure(plain, (), sources).own_aggregation_head
    with pytest.raises(BeitJaxError, match=r"--tokens\.own-head: of aggregation layers"):
        MaskedTokensRecipe("test", tokens=TokenOptions(own_head=True)).check()


def test_fine_tuning_has_no_use_for_aggregation_layers() -> None:
    _, (_, dropped, _) = start(random_checkpoint(AGGREGATING), TINY)
    layers = {name for name in param_shapes(AGGREGATING) if name.startswith("aggregation/")}
    assert set(dropped) == layers | set(MASKED_ONLY)


def test_bfloat16_becomes_float32() -> None:
    checkpoint = random_checkpoint(MASKED, ml_dtypes.bfloat16)
    found, _ = start(checkpoint, TINY)
    name = "beit/blocks/mlp/fc1/kernel"
    assert np.array_equal(found[name], checkpoint.params[name].astype(np.float32))


REFUSED = {
    "hidden size": (
        {"hidden_size": 32},
        r"beit/blocks/attention/out_bias: the checkpoint has \[4, 64\], the model needs \[4, 32\]; choose its variant",
    ),
    "depth": ({"num_hidden_layers": 3}, r".*: the checkpoint has \[4, .*\], the model needs \[3, .*\]; .*"),
    "heads": (
        {"num_attention_heads": 8},
        r"beit/blocks/attention/out_kernel: the checkpoint has \[4, 4, 16, 64\], the model needs \[4, 8, 8, 64\]; .*",
    ),
    "MLP": ({"intermediate_size": 64}, r"beit/blocks/mlp/fc1/bias: .* \[4, 96\], .* \[4, 64\]; .*"),
    "no layer scale": (
        {"layer_scale_init_value": 0.0},
        r"beit/blocks/gamma_1: the checkpoint has \[4, 64\], the model none; choose its variant",
    ),
    "absolute positions": (
        {"use_absolute_position_embeddings": True},
        r"beit/embeddings/position_embeddings: the model needs \[1, 17, 64\], the checkpoint has none; .*",
    ),
    "position bias": ({"position_bias": "both"}, "position bias shared cannot become both; .*"),
    "epsilon": ({"layer_norm_eps": 1e-12}, "layer_norm_eps: the checkpoint has 1e-06, the model 1e-12; .*"),
    "activation": ({"hidden_act": "relu"}, "hidden_act: the checkpoint has gelu, the model relu; .*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_architecture_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(BeitJaxError) as caught:
        from_checkpoint(random_checkpoint(MASKED), replace(TINY, **changes), KEY)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_a_checkpoint_that_does_not_fit_its_own_configuration_is_refused() -> None:
    checkpoint = random_checkpoint(MASKED)
    name = "beit/blocks/norm1/scale"
    without = {leaf: value for leaf, value in checkpoint.params.items() if leaf != name}
    for params, message in (
        (without, f"{name}: missing in the checkpoint, by its own configuration; convert it again"),
        (checkpoint.params | {"beit/x\n": np.zeros(1)}, r"beit/x\n: unexpected in the checkpoint, by its own"),
        (
            checkpoint.params | {name: np.zeros((4, 65), np.float32)},
            f"{name}: expected [4, 64] by the checkpoint's own configuration, found [4, 65]; convert it again",
        ),
    ):
        with pytest.raises(BeitJaxError) as caught:
            from_checkpoint(replace(checkpoint, params=params), TINY, KEY)
        assert str(caught.value).startswith(message)


def test_the_report_is_lines_for_people() -> None:
    _, report = from_checkpoint(random_checkpoint(MASKED), TINY, KEY)
    assert report.lines() == [
        "adapted    beit/blocks/attention/bias_table",
        "dropped    " + ", ".join(MASKED_ONLY),
        "starts new " + ", ".join(POOLER + CLASSIFIER),
    ]
    assert from_checkpoint(random_checkpoint(TINY), TINY, KEY)[1].lines() == []


@pytest.mark.timm
def test_timm_starts_a_fine_tuned_model_alike() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 1.5}
    model = timm.models.beit.Beit(
        **options, num_classes=7, use_rel_pos_bias=True, init_values=0.1, head_init_scale=0.001
    )
    theirs, ours = model.state_dict(), drawn(TINY, "finetune")
    for layer in range(4):
        for name, leaf in {
            "attn.qkv.weight": "attention/qkv_kernel",
            "attn.proj.weight": "attention/out_kernel",
            "mlp.fc1.weight": "mlp/fc1/kernel",
            "mlp.fc2.weight": "mlp/fc2/kernel",
        }.items():
            found = ours[f"beit/blocks/{leaf}"][layer]
            assert same_distribution(found, theirs[f"blocks.{layer}.{name}"]), (layer, name)
    assert same_distribution(ours["beit/embeddings/patch_kernel"], theirs["patch_embed.proj.weight"])
    assert same_distribution(ours["classifier/kernel"], theirs["head.weight"])
