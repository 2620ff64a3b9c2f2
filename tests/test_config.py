import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from beit_jax import json_file
from beit_jax.config import BeitConfig
from beit_jax.convert.formats.config_notes import hf_notes
from beit_jax.errors import BeitJaxError
from beit_jax.json_file import read_json, read_json_array
from beit_jax.models.build import num_params
from beit_jax.variants import VARIANTS

# microsoft/unilm@768a3c8 beit/README.md and its models instantiated; the last rows are derived from these.
PARAMETERS = {
    "beit_base_patch16_224_pt22k": 91_965_776,
    "beit_large_patch16_224_pt22k": 311_534_016,
    "beit_base_patch16_224_pt22k_ft22k": 102_557_713,
    "beit_large_patch16_224_pt22k_ft22k": 325_792_593,
    "beit_base_patch16_224": 86_530_984,
    "beit_base_patch16_384": 86_744_104,
    "beit_large_patch16_224": 304_430_568,
    "beit_large_patch16_384": 304_998_888,
    "beit_large_patch16_512": 305_674_728,
    "beit_base_patch16_224_pt1k_800ep": 92_089_856,
    # beit/semantic_segmentation/README.md.
    "beit_base_patch16_640_ade20k": 163_407_980,
    "beit_large_patch16_640_ade20k": 441_271_084,
    # facebookresearch/data2vec_vision@af9a363, less the mask token and the (d, d) regression head, which the published
    # encoders dropped.
    "data2vec_vision_base": 86_256_720 - 768 - (768 * 768 + 768),
    "data2vec_vision_large": 304_186_816 - 1024 - (1024 * 1024 + 1024),
    "data2vec_vision_base_ft1k": 86_530_984,
    "data2vec_vision_large_ft1k": 304_430_568,
    # dit/README.md: BEiT with 197 absolute positions instead of bias tables.
    "dit_base": 91_965_776 - 732 * 12 + 197 * 768,
    "dit_large": 311_534_016 - 732 * 16 + 197 * 1024,
    "dit_base_finetuned_rvlcdip": 86_530_984 - 12 * 732 * 12 + 197 * 768 - 984 * 769,
    "dit_large_finetuned_rvlcdip": 304_430_568 - 24 * 732 * 16 + 197 * 1024 - 984 * 1025,
}


def test_every_variant_has_its_published_size() -> None:
    assert {name: num_params(config) for name, config in VARIANTS.items()} == PARAMETERS


def test_defaults_are_those_of_transformers() -> None:
    for kind, name in ((transformers.BeitConfig, "beit"), (transformers.Data2VecVisionConfig, "data2vec-vision")):
        written = json.loads(kind().to_json_string(use_diff=False))
        assert BeitConfig.from_hf(written) == BeitConfig.from_hf({"model_type": name})
        assert hf_notes(written) == []


configs = st.builds(
    BeitConfig,
    model_type=st.sampled_from(["beit", "data2vec-vision"]),
    task=st.sampled_from(["features", "image_classification"]),
    image_size=st.sampled_from([(32, 32), (32, 64)]),
    patch_size=st.sampled_from([(8, 8), (16, 8)]),
    layer_norm_eps=st.floats(0, 1),
    pooling=st.sampled_from(["mean", "cls"]),
    add_pooling_layer=st.booleans(),
    position_bias=st.sampled_from(["none", "shared", "per_layer", "both"]),
    position_resize=st.sampled_from(["bilinear", "geometric", "geometric_linear"]),
    use_mask_token=st.booleans(),
    layer_scale_init_value=st.floats(0, 1),
)


@given(configs)
def test_to_hf_and_back(config: BeitConfig) -> None:
    if config.task == "image_classification":
        config = replace(config, labels=("cat", "dog \u2192", "cat 2"))
    assert BeitConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("taps", ["original", "hf"])
def test_segmentation_and_backbone_to_hf_and_back(taps: Any) -> None:
    config = replace(
        VARIANTS["beit_base_patch16_640_ade20k"],
        feature_taps=taps, use_auxiliary_head=False, auxiliary_num_convs=3, auxiliary_concat_input=True,
        auxiliary_channels=7, auxiliary_loss_weight=0.5, semantic_loss_ignore_index=0, pool_scales=(2, 5),
    )  # fmt: skip
    backbone = BeitConfig(task="backbone", out_indices=(1, 2, 5, 9), feature_taps=taps, add_fpn=True)
    tokens = replace(backbone, add_fpn=False, reshape_hidden_states=False, out_indices=(0, 4))
    for each in (config, backbone, tokens):
        written = json.loads(json.dumps(each.to_hf()))
        assert BeitConfig.from_hf(written) == each
        theirs = transformers.BeitConfig(**written)
        assert tuple(theirs.out_indices) == each.out_indices and theirs.num_labels == (each.num_labels or 2)


def test_which_hidden_states_are_tapped() -> None:
    """unilm takes the outputs of 0-based blocks; transformers reads hidden_states[i - 1] in its segmentation models."""
    published = VARIANTS["beit_base_patch16_640_ade20k"]
    assert published.tapped_states == (4, 6, 8, 12)
    from_hf = BeitConfig.from_hf({"model_type": "beit", "image_size": 640, "id2label": {"0": "a"}} | SEGMENTS)
    assert from_hf.feature_taps == "hf" and from_hf.tapped_states == (2, 4, 6, 10)
    legacy = SEGMENTS | {"out_indices": None, "segmentation_indices": [3, 5, 7, 11]}
    assert BeitConfig.from_hf({"model_type": "beit"} | legacy).tapped_states == (2, 4, 6, 10)
    data2vec = {"model_type": "data2vec-vision", "architectures": ["Data2VecVisionForSemanticSegmentation"]}
    assert BeitConfig.from_hf(data2vec).out_indices == (3, 5, 7, 11)
    backbone = {"model_type": "beit", "architectures": ["BeitBackbone"]}
    assert BeitConfig.from_hf(backbone).tapped_states == (12,)
    assert BeitConfig.from_hf(backbone | {"out_indices": [2, -1]}).tapped_states == (2, 12)
    assert BeitConfig.from_hf(backbone | {"out_features": ["stem", "stage3"]}).tapped_states == (0, 3)


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    config = replace(VARIANTS["data2vec_vision_base_ft1k"], labels=tuple(f"class {i}" for i in range(1000)))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Data2VecVisionConfig)
    assert (theirs.num_labels, theirs.id2label[999]) == (1000, "class 999")
    assert BeitConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config


SEGMENTS = {"architectures": ["BeitForSemanticSegmentation"], "out_indices": [3, 5, 7, 11]}
BAD = [
    ({"model_type": "vit"}, "model_type: expected beit or data2vec-vision"),
    ({}, "model_type: expected beit or data2vec-vision, found nothing"),
    ({"hidden_size": "32"}, 'hidden_size: expected an integer, found "32"'),
    ({"hidden_size": True}, "hidden_size: expected an integer, found true"),
    ({"hidden_size": 0}, "hidden_size: expected a positive integer, found 0"),
    ({"hidden_size": 100}, "hidden_size 100 is not a multiple of 12 heads"),
    ({"image_size": [224]}, "image_size: expected an integer or [height, width]"),
    (
        {"image_size": 225},
        "image_size (225, 225) is not a multiple of patch_size (16, 16); (224, 224) and (240, 240) are",
    ),
    ({"image_size": [9, 33]}, "image_size (9, 33) is not a multiple of patch_size (16, 16); (16, 32) and (16, 48) are"),
    ({"layer_norm_eps": "small"}, "layer_norm_eps: expected a number"),
    ({"drop_path_rate": 1.5}, "drop_path_rate: expected a rate in [0, 1), found 1.5"),
    ({"use_mean_pooling": 1}, "use_mean_pooling: expected true or false, found 1"),
    ({"hidden_act": "mish"}, "hidden_act: expected gelu or"),
    ({"architectures": ["BeitForDepth"]}, "architectures: expected one of BeitModel"),
    ({"architectures": ["BeitForSemanticSegmentation"]}, "out_indices: expected four growing indices of the 12 blocks"),
    (
        SEGMENTS | {"out_indices": [1, 2, 3, 15]},
        "out_indices: expected four growing indices of the 12 blocks, found [1",
    ),
    (SEGMENTS | {"out_indices": [1, 3, 2, 4]}, "out_indices: expected four growing indices"),
    (SEGMENTS | {"out_indices": [0, 1, 2, 3]}, "out_indices: expected four growing indices"),
    (SEGMENTS | {"out_indices": "all"}, 'out_indices: expected a list of integers, found "all"'),
    (SEGMENTS | {"pool_scales": []}, "pool_scales: expected positive integers, found []"),
    (SEGMENTS | {"num_labels": 0}, "labels: expected the names of the classes, found none"),
    (SEGMENTS | {"auxiliary_num_convs": 0}, "auxiliary_num_convs: expected a positive integer, found 0"),
    (SEGMENTS | {"beit_jax": {"feature_taps": "timm"}}, "beit_jax: feature_taps: expected original or hf"),
    ({"architectures": ["BeitBackbone"], "out_indices": []}, "out_indices: expected some growing indices"),
    ({"architectures": ["ViTModel"]}, "architectures: expected one of BeitModel"),
    ({"architectures": ["BeitForImageClassification"], "id2label": ["a"]}, "id2label: expected an object"),
    ({"beit_jax": {"position_resize": "nearest"}}, "beit_jax: position_resize: expected bilinear or"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_configurations_are_named(change: dict[str, Any], message: str) -> None:
    config = ({"model_type": "beit"} if "model_type" not in change and change else {}) | change
    with pytest.raises(BeitJaxError) as error:
        BeitConfig.from_hf(config, file="dir/config.json")
    assert str(error.value).startswith(f"dir/config.json: {message}")
    assert "\n" not in str(error.value)


def test_notes_name_unknown_keys_and_remote_code() -> None:
    notes = hf_notes({"model_type": "beit", "hiden_size": 5, "auto_map": {"AutoModel": "evil.Model"}}, file="c.json")
    assert notes == [
        "c.json: auto_map names code to import; ignored, nothing of it is run",
        "c.json: unknown key hiden_size ignored; did you mean hidden_size?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "expected a JSON object, found a list"),
        (b'{"a": 1, "a": 2}', "the key a stands twice"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BeitJaxError, match="config.json: " + message.replace("(", r"\(")):
        read_json(path)


def test_json_of_another_kind_of_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO in a model directory must not hang, nor a huge file fill the memory."""
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BeitJaxError, match=r"pipe\.json: expected a regular file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(BeitJaxError, match=f"{tmp_path}: cannot be read"):
        read_json(tmp_path)
    (tmp_path / "large.json").write_bytes(b'{"a": 1000}')
    monkeypatch.setattr(json_file, "MAX_BYTES", 11)
    assert read_json(tmp_path / "large.json") == {"a": 1000}
    monkeypatch.setattr(json_file, "MAX_BYTES", 10)
    with pytest.raises(BeitJaxError, match=r"large\.json: .*at most 10 bytes"):
        read_json(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{", "not JSON"), ("{}", "found a dict"), ("[1]", None)]
)
def test_arrays(tmp_path: Path, content: str | None, message: str | None) -> None:
    path = tmp_path / "array.json"
    if content is not None:
        path.write_text(content)
    if message is None:
        assert read_json_array(path, advice="ask again") == [1]
        return
    with pytest.raises(BeitJaxError, match=rf"array\.json: .*{message}.*; ask again"):
        read_json_array(path, advice="ask again")
