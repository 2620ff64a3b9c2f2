"""Scores that count what nobody asked for, or nothing: how annotations count classes is the checkpoint's word.

A model of two classes with random weights and masks of 0 and 1 once scored 100 %, because class 0 was thrown away.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_jax.cli.main import main
from beit_jax.images.label_maps import ADE20K_CLASSES, write_label_map
from beit_jax.images.processor import ImageProcessor, ade20k_processor
from beit_jax.inference.predict import from_pretrained
from beit_jax.inference.segmentation import segment
from beit_jax.train.evaluation.truths import numbering
from tests.support.segmenter import save_segmenter

TWO = ("background", "flower")
SIZE = (24, 30)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, and masks in which the share of class 1 grows with the image."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(1)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        write_label_map((rng.random(SIZE) < 0.2 * (1 + i)).astype(np.int32), root / "masks" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool | None, Path]:
    """The same model of two classes, by what its checkpoint says of do_reduce_labels."""
    root = tmp_path_factory.mktemp("models")
    return {says: save_segmenter(root / str(says), TWO, do_reduce_labels=says) for says in (None, False, True)}


def evaluate(model: Path, scenes: Path, *options: str) -> int:
    folders = ["--images", str(scenes / "images"), "--annotations", str(scenes / "masks")]
    return main(["evaluate", str(model), *folders, *options])


def counted(model: Path, scenes: Path, first: int) -> tuple[float, int]:
    """(aAcc, pixels) of masks that count from `first`, by a plain loop over the files."""
    loaded = from_pretrained(model)
    right = total = 0
    for image in sorted((scenes / "images").iterdir()):
        truth = np.asarray(Image.open(scenes / "masks" / image.name)).astype(int) - first
        found = segment(*loaded, image)
        right, total = right + int(((found == truth) & (truth >= 0)).sum()), total + int((truth >= 0).sum())
    return right / total, total


@pytest.mark.parametrize(
    ("says", "options", "first"),
    [
        (False, [], 0),
        (True, [], 1),
        (None, ["--labels-from-zero"], 0),
        (None, ["--labels-from-one"], 1),
        (True, ["--labels-from-zero"], 0),
        (False, ["--labels-from-one"], 1),
        (False, ["--as-trained"], 0),  # changes the image, not the masks
    ],
)
def test_masks_are_read_as_the_checkpoint_or_the_option_says(
    says: bool | None, options: list[str], first: int, models: dict[bool | None, Path], scenes: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert evaluate(models[says], scenes, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    accuracy, pixels = counted(models[says], scenes, first)
    assert (found["pixels"], found["all_pixels"], found["labels_from"]) == (pixels, 3 * SIZE[0] * SIZE[1], first)
    if "--as-trained" not in options:
        assert found["aAcc"] == pytest.approx(accuracy)
    assert evaluate(models[says], scenes, *options) == 0
    assert f"counted {pixels:,} of 2,160 pixels" in capsys.readouterr().out


def test_where_nothing_says_it_the_choice_is_demanded(
    models: dict[bool | None, Path], scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--as-trained"]):
        assert evaluate(models[None], scenes, *options) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert "--labels-from-zero" in captured.err and "--labels-from-one" in captured.err
    assert evaluate(models[None], scenes, "--labels-from-zero", "--labels-from-one") == 2


def test_the_150_classes_of_ade20k_count_from_one() -> None:
    silent = ImageProcessor(resize=(32, 32))
    assert numbering(silent, ADE20K_CLASSES).from_one
    assert not numbering(ImageProcessor(do_reduce_labels=False), ADE20K_CLASSES).from_one
    assert numbering(ade20k_processor(), 3).from_one, "as this library trains it"


@pytest.mark.parametrize(("says", "value"), [(True, 0), (True, 255), (False, 255)])
def test_where_no_pixel_counts_there_is_no_score(
    says: bool, value: int, models: dict[bool | None, Path], scenes: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for path in (scenes / "masks").iterdir():
        write_label_map(np.full(SIZE, value), tmp_path / path.name)
    arguments = ["--images", str(scenes / "images"), "--annotations", str(tmp_path)]
    for json_option in ([], ["--json"]):
        assert main(["evaluate", str(models[says]), *arguments, *json_option]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "2,160 pixels" in captured.err


@pytest.mark.parametrize(
    ("ignored", "says", "values", "classes"),
    [
        (255, False, [0, 1, 255], [0, 1, None]),
        (1, False, [0, 1, 255], [0, None, None]),  # the model was trained without its second class
        (0, False, [0, 1], [None, 1]),
        (7, False, [0, 1, 7, 255], [0, 1, None, None]),
        (-100, False, [0, 1, 255], [0, 1, None]),  # torch's default, which no PNG holds
        (0, True, [0, 1, 2], [None, None, 1]),
        (1, True, [0, 1, 2, 255], [None, 0, None, None]),
        (65535, True, [0, 1, 2, 65535], [None, 0, 1, None]),
    ],
)
def test_what_the_checkpoint_ignores_does_not_count(
    ignored: int, says: bool, values: list[int], classes: list[int | None], models: dict[bool | None, Path],
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rng, model = np.random.default_rng(3), tmp_path / "model"
    shutil.copytree(models[says], model)
    config = json.loads((model / "config.json").read_text()) | {"semantic_loss_ignore_index": ignored}
    (model / "config.json").write_text(json.dumps(config))
    loaded, right, total = from_pretrained(model), 0, 0
    (tmp_path / "masks").mkdir()
    for image in sorted((scenes / "images").iterdir()):
        truth = rng.integers(0, len(values), SIZE)
        write_label_map(np.asarray(values)[truth], tmp_path / "masks" / image.name)
        found = segment(*loaded, image)
        total += sum(int((truth == i).sum()) for i, name in enumerate(classes) if name is not None)
        right += sum(int(((truth == i) & (found == name)).sum()) for i, name in enumerate(classes) if name is not None)
    arguments = ["--images", str(scenes / "images"), "--annotations", str(tmp_path / "masks"), "--json"]
    assert main(["evaluate", str(model), *arguments]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["pixels"], scores["all_pixels"]) == (total, 3 * SIZE[0] * SIZE[1])
    assert scores["aAcc"] == pytest.approx(right / total)


def test_a_class_beyond_the_model_names_the_other_option(
    models: dict[bool | None, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (scenes / "masks").iterdir():
        write_label_map(np.full(SIZE, 2), tmp_path / path.name)
    arguments = ["evaluate", str(models[False]), "--images", str(scenes / "images"), "--annotations", str(tmp_path)]
    assert main(arguments) == 2
    assert "label 2" in (message := capsys.readouterr().err) and "--labels-from-one" in message
    assert main([*arguments, "--labels-from-one"]) == 0  # the advice works


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [("do_reduce_labels", True, True), ("reduce_labels", True, True), ("do_reduce_labels", False, False),
     ("reduce_labels", None, None), ("other", 1, None)],
)  # fmt: skip
def test_what_a_preprocessor_config_says_survives(key: str, value: object, read: bool | None) -> None:
    found = ImageProcessor.from_hf({key: value})
    assert found.do_reduce_labels is read
    assert ImageProcessor.from_hf(json.loads(json.dumps(found.to_hf()))).do_reduce_labels is read


def test_reassessed_labels_of_no_image_are_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.resources import files

    digits = Path(str(files("beit_jax") / "digits"))
    (tmp_path / "data" / "nine").mkdir(parents=True)
    picture = sorted((digits / "images").iterdir())[0]
    (tmp_path / "data" / "nine" / "ILSVRC2012_val_00000001.png").write_bytes(picture.read_bytes())
    (tmp_path / "real.json").write_text("[[]]")
    arguments = ["evaluate", str(digits), "--data", str(tmp_path / "data"), "--real", str(tmp_path / "real.json")]
    assert main([*arguments, "--workers", "0"]) == 2
    assert "no label for any of 1 images" in capsys.readouterr().err
