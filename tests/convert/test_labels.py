"""Label maps that are not 0 to n - 1, and heads for other classes, as transformers reads and writes them."""

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
import transformers
from cases import thorough
from flax import nnx
from PIL import Image

import beit_jax
from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.config_file import label_numbers
from beit_jax.convert import Options, convert, load, plan
from beit_jax.convert.formats.config_notes import label_notes
from beit_jax.convert.labels import read_classes
from beit_jax.errors import BeitJaxError
from beit_jax.models.heads import change_head
from beit_jax.weights.native import read_config

CLASSES = 8
GAPS = [0, 1, 2, 4, 5, 7, 8, 9]  # two classes were taken out of ten, and the numbers of the others left
NAMES = [f"class {number}" for number in GAPS]

logits_of = jax.jit(lambda model, pixels: model(pixels).logits)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose map of names has two gaps, as transformers' conversion of BEiT's 22k models leaves them."""
    model = reference.random_model(**reference.TINY | reference.BIAS["both"] | {"num_labels": CLASSES})
    model.config.id2label = dict(zip(GAPS, NAMES, strict=True))
    model.config.label2id = dict(zip(NAMES, GAPS, strict=True))
    return reference.save(model, tmp_path_factory.mktemp("gaps"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return path


def torch_logits(directory: Path, pixels: np.ndarray) -> np.ndarray:
    model = transformers.BeitForImageClassification.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(reference.to_torch(pixels)).logits.numpy()


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


# --- Gaps ------------------------------------------------------------------------------------------------------------


def test_a_map_with_gaps_there_and_back(
    source: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", str(source), str(native)]) == 0
    said = capsys.readouterr().out
    assert "from 0 to 9, without 3, 6: read in this order as the names of outputs 0 to 7" in said
    assert "it has no name for 3, 6, and gives outputs from 3 on those of other classes" in said

    assert main(["classify", str(native), str(image), "--top", str(CLASSES), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    guesses = found[0]["classes"] if isinstance(found, list) else found["classes"]
    assert {guess["index"]: guess["label"] for guess in guesses} == dict(enumerate(NAMES))

    assert main(["export", str(native), str(back)]) == 0
    theirs = transformers.AutoConfig.from_pretrained(back)
    assert theirs.id2label == dict(zip(GAPS, NAMES, strict=True)) and theirs.num_labels == CLASSES
    assert theirs.label2id == dict(zip(NAMES, GAPS, strict=True))
    pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    model, _ = beit_jax.from_pretrained(native)
    assert np.allclose(torch_logits(back, pixels), logits_of(model, pixels), atol=1e-5)
    best = int(np.argmax(torch_logits(back, pixels)[0]))
    assert model.config.labels[best] == NAMES[best]
    with pytest.raises(KeyError):  # what the note says of transformers
        [theirs.id2label[output] for output in range(CLASSES)]

    assert main(["convert", str(back), str(tmp_path / "again")]) == 0
    again = BeitConfig.from_file(tmp_path / "again/config.json")
    assert again == read_config(native) and list(label_numbers(again.labels)) == GAPS


def test_the_22k_map(tmp_path: Path) -> None:
    names = {str(i): f"n{i}" for i in range(21843) if i not in (9205, 15027)}
    content = {"model_type": "beit", "architectures": ["BeitForImageClassification"], "id2label": names}
    config = BeitConfig.from_hf(content)
    assert (config.labels[9204], config.labels[9205], config.labels[-1]) == ("n9204", "n9206", "n21842")
    assert config.to_hf()["id2label"] == names and BeitConfig.from_hf(config.to_hf()) == config
    (note,) = label_notes(content)
    assert "21841 names from 0 to 21842, without 9205, 15027" in note and "no name for 9205, 15027" in note
    assert "outputs from 9205 on" in note


def test_other_names_have_their_usual_numbers(source: Path, tmp_path: Path) -> None:
    """The numbers belong to the file's names: data's names, or the same names asked for, are numbered from 0."""
    from dataclasses import replace

    config = read_config_of(source)
    assert list(label_numbers(replace(config, image_size=64).labels)) == GAPS
    assert list(label_numbers(replace(config, labels=tuple(NAMES)).labels)) == list(range(CLASSES))
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    done = convert(source, tmp_path / "native", Options(labels=tmp_path / "names.txt"))
    assert any("head kept: its 8 classes are these already, now numbered from 0" in note for note in done.notes)
    assert config_of(tmp_path / "native")["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    kernels = [found.params["classifier/kernel"] for found in (load(source), beit_jax.load(tmp_path / "native"))]
    assert np.array_equal(*kernels)


def read_config_of(directory: Path) -> BeitConfig:
    return BeitConfig.from_file(directory / "config.json")


# --- Maps as people write them ---------------------------------------------------------------------------------------

SAME = {"0": "a", "1": "b", "2": "c"}
READ: list[tuple[dict[str, Any], list[str], str | None]] = [
    ({"id2label": {"1": "a", "2": "b", "3": "c"}}, ["a", "b", "c"], "from 1 to 3"),
    ({"id2label": {"00": "a", "01": "b", "02": "c"}}, ["a", "b", "c"], None),
    ({"id2label": {"0.0": "a", "1.0": "b", " 2": "c"}}, ["a", "b", "c"], None),
    ({"id2label": {0: "a", 1: "b", 2.0: "c"}}, ["a", "b", "c"], None),
    ({"id2label": {"2": "c", "0": "a", "1": "b"}}, ["a", "b", "c"], None),
    ({"id2label": {"0": "a", "1": "a", "2": "c"}, "label2id": {"a": 1, "c": 2}}, ["a", "a", "c"], None),
    ({"id2label": {"0": "a", "1": None, "2": "c"}}, ["a", "LABEL_1", "c"], "1 of its 3 names are null"),
    ({"id2label": {"0": 10, "1": 20, "2": 2.5}}, ["10", "20", "2.5"], None),
    ({"id2label": SAME, "label2id": {"a": 0, "b": "1", "c": 2.0}}, ["a", "b", "c"], None),
    ({"id2label": SAME, "label2id": {"a": 2, "b": 1, "c": 0}}, ["a", "b", "c"], "in 2 of 3 names (a is 2 there)"),
    ({"id2label": SAME, "label2id": {"cat": 0}}, ["a", "b", "c"], "in 1 of 1 names (cat is 0 there)"),
    ({"id2label": SAME, "label2id": ["a"]}, ["a", "b", "c"], "label2id: expected an object, ignored"),
    ({"id2label": SAME, "label2id": None}, ["a", "b", "c"], None),
    ({"id2label": SAME, "num_labels": 5}, ["a", "b", "c"], "num_labels says 5, id2label has 3 names"),
    ({"label2id": {"b": 1, "a": 0, "c": 2}}, ["a", "b", "c"], "the names of classes are label2id's"),
    ({"label2id": {"b": 1, "a": 0, "c": 2}, "num_labels": 3}, ["a", "b", "c"], "the names of classes are label2id's"),
    ({"label2id": {"b": 1, "a": 0}, "num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"], "num_labels says 3"),
    ({"label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ["LABEL_0", "LABEL_1"], None),
    ({"label2id": {"a": 0, "b": 0}, "num_labels": 2}, ["LABEL_0", "LABEL_1"], None),
]  # fmt: skip


@pytest.mark.parametrize(("content", "labels", "note"), READ, ids=[str(content)[:70] for content, _, _ in READ])
def test_maps_as_people_write_them(content: dict[str, Any], labels: list[str], note: str | None) -> None:
    head = {"model_type": "beit", "architectures": ["BeitForImageClassification"]}
    config = BeitConfig.from_hf(head | content)
    assert list(config.labels) == labels and BeitConfig.from_hf(config.to_hf()) == config
    notes = label_notes(content)
    assert (len(notes) == 1 and note in notes[0]) if note else notes == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"cat": 0, "dog": 1}, "are id2label and label2id exchanged"),
        ({"0": "a", "00": "b"}, "a number twice"),
        ({"1_0": "a"}, "numbers as keys"),
        ({"0": "a", "-1": "b"}, "numbers as keys"),
    ],
)
def test_maps_that_are_refused(names: dict[str, Any], said: str) -> None:
    with pytest.raises(BeitJaxError, match=said):
        BeitConfig.from_hf({"model_type": "beit", "architectures": ["BeitForImageClassification"], "id2label": names})


# --- Other classes ---------------------------------------------------------------------------------------------------

FILES: list[tuple[str, list[str] | list[int]]] = [
    ("class 4\nclass 0\n", ["class 4", "class 0"]),
    ("\ufeffcat\r\n dog \r\n\r\n", ["cat", "dog"]),
    ("3\n0\n5\n", [3, 0, 5]),
    ("[3, 0, 5]", [3, 0, 5]),
    ('["3", "0"]', ["3", "0"]),
    ('{"0": "cat", "1": "dog"}', ["cat", "dog"]),
    ('{"id2label": {"1": "cat", "2": "dog"}, "hidden_size": 4}', ["cat", "dog"]),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=[text[:20] for text, _ in FILES])
def test_files_of_classes(text: str, expected: list[str] | list[int], tmp_path: Path) -> None:
    (tmp_path / "classes").write_text(text, newline="")
    assert read_classes(tmp_path / "classes") == expected


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["--labels", "FILE"], "", "holds no class"),
        (["--labels", "FILE"], "cat\n\ndog", "line 2: expected a class"),
        (["--labels", "FILE"], '["cat", 3]', "names only, or numbers only, found 3"),
        (["--labels", "FILE"], "[1, 2", "not JSON"),
        (["--labels", "FILE"], "cat\ncat", "cat stands twice"),
        (["--labels", "FILE"], "1\n8", "class 8, expected 0 to 7"),
        (["--labels", "FILE"], "1\n1", "class 1 stands twice"),
        (["--labels", "nowhere"], "", "no such file"),
        (["--labels", "FILE", "--num-labels", "3"], "cat", "give one"),
        (["--num-labels", "0"], "", "expected 1 to 1000000, found 0"),
        (["--seed", "3"], "", "--labels or --num-labels asks"),
        (["--seed", "-1", "--num-labels", "3"], "", "expected an integer of at least 0, found -1"),
        (["--problem-type", "single_label_classification", "--num-labels", "1"], "", "at least two classes"),
    ],
)  # fmt: skip
def test_heads_that_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str, said: str
) -> None:
    (tmp_path / "file").write_text(text)
    words = [str(tmp_path / "file") if word == "FILE" else word for word in arguments]
    assert main(["convert", str(source), str(tmp_path / "out"), *words]) == 2
    message = capsys.readouterr().err
    assert said in message and arguments[0] in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["names", "numbers"])
def test_a_subset_keeps_its_weights(source: Path, tmp_path: Path, by: str) -> None:
    """The logits of three of eight classes are those that transformers' whole model has for them."""
    rows = [5, 0, 3]
    lines = [NAMES[row] if by == "names" else str(row) for row in rows]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", str(source), str(native), "--labels", str(tmp_path / "classes.txt")]) == 0
    assert main(["export", str(native), str(back)]) == 0
    pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    whole = torch_logits(source, pixels)[:, rows]
    model, _ = beit_jax.from_pretrained(native)
    assert np.allclose(logits_of(model, pixels), whole, atol=1e-5)
    assert np.allclose(torch_logits(back, pixels), whole, atol=1e-5)
    assert config_of(back)["id2label"] == {str(i): NAMES[row] for i, row in enumerate(rows)}
    same, _ = beit_jax.from_pretrained(source, labels=[NAMES[row] for row in rows] if by == "names" else rows)
    assert np.array_equal(logits_of(same, pixels), logits_of(model, pixels))


def test_a_new_head_is_drawn_and_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("class 0\ncat\ndog\n")
    words = ["--labels", str(tmp_path / "names.txt"), "--problem-type", "multi_label_classification", "--seed", "4"]
    assert main(["convert", str(source), str(tmp_path / "out"), *words, "--json"]) == 0
    notes = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert (
        "new head of 3 classes: class 0, cat, dog; the checkpoint's, of 8 classes, is left out, although 1 of" in notes
    )
    assert "drawn with seed 4" in notes and "problem_type is now multi_label_classification" in notes
    old, new = load(source).params, beit_jax.load(tmp_path / "out").params
    assert {name for name in new if not np.array_equal(new[name], old[name])} == {
        "classifier/kernel",
        "classifier/bias",
    }
    assert new["classifier/kernel"].std() == pytest.approx(0.02, rel=0.2) and not new["classifier/bias"].any()
    assert config_of(tmp_path / "out")["problem_type"] == "multi_label_classification"

    with pytest.warns(UserWarning, match="new head of 3 classes"):
        again, _ = beit_jax.from_pretrained(source, labels=["x", "y", "z"], seed=4)
    assert np.array_equal(again.classifier.kernel[...], new["classifier/kernel"])
    with pytest.warns(UserWarning, match="drawn with seed 5"):
        other, _ = beit_jax.from_pretrained(source, labels=3, seed=5)
    assert not np.array_equal(other.classifier.kernel[...], new["classifier/kernel"])
    assert other.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    kept, _ = beit_jax.from_pretrained(source, labels=NAMES)  # no warning: they are the checkpoint's own
    assert np.array_equal(kept.classifier.kernel[...], old["classifier/kernel"])


ENCODERS = {
    "features, mean": ("features", {}),
    "features, class token": ("features", {"use_mean_pooling": False}),
    "masked images, mean": ("masked_image_modeling", {"use_mask_token": True}),
    "masked images, class token": ("masked_image_modeling", {"use_mask_token": True, "use_mean_pooling": False}),
}


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_a_classifier_on_an_encoder(kind: str, tmp_path: Path) -> None:
    """transformers' classifier on the same encoder, with the same head, has the same logits."""
    task, options = ENCODERS[kind]
    made = reference.random_model(task=task, **reference.TINY | reference.BIAS["shared"] | options)
    source, native, back = reference.save(made, tmp_path / "source"), tmp_path / "native", tmp_path / "back"
    (tmp_path / "names.json").write_text('["cat", "dog", "bird"]')
    assert main(["convert", str(source), str(native), "--labels", str(tmp_path / "names.json")]) == 0
    assert main(["export", str(native), str(back)]) == 0
    head = beit_jax.load(native).params
    theirs = transformers.BeitForImageClassification.from_pretrained(source, num_labels=3, attn_implementation="eager")
    with torch.no_grad():
        theirs.classifier.weight.copy_(torch.from_numpy(head["classifier/kernel"].T.copy()))
        theirs.classifier.bias.copy_(torch.from_numpy(head["classifier/bias"].copy()))
    pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(reference.to_torch(pixels)).logits.numpy()
    model, _ = beit_jax.from_pretrained(native)
    assert np.allclose(logits_of(model, pixels), expected, atol=1e-5)
    assert np.allclose(torch_logits(back, pixels), expected, atol=1e-5)
    assert config_of(back)["architectures"] == ["BeitForImageClassification"]


def test_heads_of_segmentation(tmp_path: Path) -> None:
    source = reference.save(reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION), tmp_path)
    pixels = np.random.default_rng(1).standard_normal((1, 32, 32, 3)).astype(np.float32)
    whole, _ = beit_jax.from_pretrained(source)
    cut, _ = beit_jax.from_pretrained(source, labels=[6, 2])
    assert cut.config.labels == ("LABEL_6", "LABEL_2")
    assert np.allclose(logits_of(cut, pixels), logits_of(whole, pixels)[..., [6, 2]], atol=1e-5)
    with pytest.warns(UserWarning, match="the checkpoint's, of 7 classes, is left out"):
        new, _ = beit_jax.from_pretrained(source, labels=["back", "front"])
    assert new.decode_head.classifier.kernel.shape[-1] == 2 and new.auxiliary_head.classifier.kernel.shape[-1] == 2


def test_what_no_head_can_be(source: Path) -> None:
    config = read_config_of(source)
    with pytest.raises(BeitJaxError, match="backbone"):
        change_head(BeitConfig(task="backbone", out_indices=(1,)), ["a"])
    with pytest.raises(BeitJaxError, match="numbers choose among a checkpoint's classes"):
        change_head(BeitConfig(), [1, 2])
    with pytest.raises(BeitJaxError, match="problem_type: of a classifier"):
        change_head(BeitConfig(), None, "regression")
    with pytest.raises(BeitJaxError, match="expected names only"):
        change_head(config, ["a", 3])  # type: ignore[list-item]
    with pytest.raises(BeitJaxError, match="found cat"):
        change_head(config, "cat")
    twice = BeitConfig(task="image_classification", labels=("crane", "cat", "crane"))
    with pytest.raises(BeitJaxError, match="several of the checkpoint's classes are called crane"):
        change_head(twice, ["crane"])
    assert change_head(twice, [2]).config.labels == ("crane",)
    assert change_head(twice, np.array([1, 0])).config.labels == ("cat", "crane")
    assert change_head(twice, (name for name in ("x", "y"))).config.labels == ("x", "y")


# --- Parameters in bfloat16 ------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], torch.nn.Module]] = {
    "classifier": lambda: reference.random_model(
        **reference.TINY | reference.BIAS["both"] | {"num_labels": 5, "use_absolute_position_embeddings": True}
    ),
    "segmenter": lambda: reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION),
}


@pytest.mark.parametrize("kind", thorough(PARTS, but=["classifier"]))
def test_parameters_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """Half the memory, and what the same rounded values compute in float32."""
    source = reference.save(PARTS[kind](), tmp_path / "source")
    pixels = np.random.default_rng(1).standard_normal((1, 48, 32, 3)).astype(np.float32)
    whole, processor = beit_jax.from_pretrained(source)
    half, _ = beit_jax.from_pretrained(source, param_dtype="bfloat16")
    leaves = jax.tree.leaves(nnx.state(half))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert 2 * sum(leaf.nbytes for leaf in leaves) == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(whole)))
    widened = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), nnx.to_pure_dict(nnx.state(whole))
    )
    expected = logits_of(beit_jax.build_model(whole.config, widened), pixels)
    assert np.allclose(logits_of(half, pixels), expected, atol=1e-5)
    assert np.allclose(expected, logits_of(whole, pixels), atol=0.2) and not np.array_equal(
        expected, logits_of(whole, pixels)
    )
    beit_jax.save_pretrained(tmp_path / "saved", half, processor)
    again, _ = beit_jax.from_pretrained(tmp_path / "saved", param_dtype=jnp.bfloat16)
    assert np.array_equal(logits_of(again, pixels), logits_of(half, pixels))
    assert {leaf.dtype.name for leaf in beit_jax.load(tmp_path / "saved").params.values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_other_dtypes_are_refused(source: Path, name: str) -> None:
    with pytest.raises(BeitJaxError, match=f"^{name}: expected float32 or bfloat16, found"):
        beit_jax.from_pretrained(source, **{name: "float16"})
    with pytest.raises(BeitJaxError, match=f"^{name}: expected float32 or bfloat16, found"):
        beit_jax.from_pretrained(source, **{name: "half of it"})


def test_a_plan_knows_the_head(source: Path) -> None:
    with plan(source, Options(num_labels=2)).checkpoint:
        pass
    assert plan(source, Options(num_labels=2)).specs["classifier/kernel"].shape == (32, 2)
