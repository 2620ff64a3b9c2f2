"""`beit-jax segment` and `beit-jax evaluate` as users run them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_jax.bulk.chunks import Chunks
from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.images import ImageProcessor, ade20k_processor
from beit_jax.images.label_maps import write_label_map
from beit_jax.inference.predict import from_pretrained
from beit_jax.inference.segmentation import Inference, segment
from beit_jax.models.build import param_shapes
from beit_jax.weights import NativeCheckpoint, save

CONFIG = BeitConfig(
    task="semantic_segmentation",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=24,
    position_bias="per_layer",
    labels=("wall", "floor", "tree", "[red]car\x1b[0m"),
    out_indices=(0, 1, 2, 3),
    auxiliary_channels=8,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    params = {
        name: (np.abs(draw) + 0.5 if name.endswith("/var") else draw * 0.3).astype(np.float32)
        for name, shape in param_shapes(CONFIG).items()
        for draw in [rng.standard_normal(shape)]
    }
    directory = tmp_path_factory.mktemp("segmenter")
    save(directory, NativeCheckpoint(CONFIG, ImageProcessor(resize=(32, 32), do_reduce_labels=True), params))
    return directory


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images of different sizes with annotations that count from 1."""
    images, annotations = tmp_path / "images", tmp_path / "annotations"
    images.mkdir(), annotations.mkdir()
    rng = np.random.default_rng(1)
    for i, size in enumerate([(40, 60), (32, 32), (20, 90)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(images / f"val_{i}.png")
        write_label_map(rng.integers(0, 5, size), annotations / f"val_{i}.png")
    return images, annotations


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_segment(checkpoint: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    image, directory = folders[0] / "val_0.png", folders[0].parent
    text = output(capsys, "segment", checkpoint, image, "-o", directory / "p.png", "--mask", directory / "m.png")
    assert "tree" in text and "%" in text and "m.png" in text and "\x1b[0m" not in text
    model, processor = from_pretrained(checkpoint)
    expected = segment(model, processor, image)
    with Image.open(directory / "m.png") as mask, Image.open(directory / "p.png") as picture:
        assert mask.mode == "L" and np.array_equal(np.asarray(mask), expected)
        assert picture.height >= 40 and picture.width > 60
    found = json.loads(output(capsys, "segment", checkpoint, image, "--json"))
    assert (found["height"], found["width"]) == (40, 60)
    shares = {area["label"]: area["share"] for area in found["classes"]}
    assert shares == {CONFIG.labels[i]: (expected == i).mean() for i in np.unique(expected)}


def test_a_table_of_areas_goes_on_with_its_label_maps(
    checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    images, _ = folders
    expected = json.loads(output(capsys, "segment", checkpoint, images, "--json", "--mask", tmp_path / "expected"))
    command = ["segment", checkpoint, images, "--table", images / "t.jsonl", "--mask", images / "m", "--chunk", "1"]
    write, calls = Chunks.write, iter(range(2))

    def killed(self: Chunks, *arguments: Any) -> None:
        if next(calls, None) is None:
            raise SystemExit(9)
        write(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Chunks, "write", killed)
        main([str(word) for word in command])
    assert (images / "m.partial" / "val_0.png").exists() and not (images / "m").exists()
    assert "areas of 3 images" in output(capsys, *command)
    assert [json.loads(line) for line in (images / "t.jsonl").read_text().splitlines()] == expected
    assert sorted(path.name for path in images.iterdir()) == ["m", "t.jsonl", "val_0.png", "val_1.png", "val_2.png"]
    for path in (tmp_path / "expected").iterdir():
        assert (images / "m" / path.name).read_bytes() == path.read_bytes()
    assert "m: already exists" in error(capsys, *command)
    for words, message in (
        (["--table", "t.npz"], "holds arrays of features alone"),
        (["--table", "t.csv", "--json"], "--json prints, and --table writes a table"),
        (["--json", "--process", "0", "--processes", "2"], "--process, --processes: of a table; give --table"),
        (["--table", "t.csv", "--workers", "2"], "--workers: segmenting prepares images itself"),
    ):
        assert message in error(capsys, "segment", checkpoint, images / "val_0.png", *words)


@pytest.mark.parametrize(
    ("options", "how", "trained"),
    [
        ([], Inference(), False),
        (["--slide"], Inference("slide"), False),
        (["--as-trained"], Inference("slide"), True),
        (["--as-trained", "--whole"], Inference("whole"), True),
        (["--as-trained", "--scales", "0.5", "1.5", "--flip"], Inference(scales=(0.5, 1.5), flip=True), True),
    ],
)
def test_options_reach_the_model(
    checkpoint: Path, folders: tuple[Path, Path], options: list[str], how: Inference, trained: bool
) -> None:
    image, mask = folders[0] / "val_2.png", folders[0].parent / "m.png"
    assert main(["segment", str(checkpoint), str(image), "--mask", str(mask), *options]) == 0
    model, processor = from_pretrained(checkpoint)
    expected = segment(model, ade20k_processor(32) if trained else processor, image, how)
    assert np.array_equal(np.asarray(Image.open(mask)), expected)


def test_evaluate(checkpoint: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", checkpoint, "--images", folders[0], "--annotations", folders[1]]
    found = json.loads(output(capsys, *arguments, "--json"))
    model, processor = from_pretrained(checkpoint)
    right = total = 0
    for image in sorted(folders[0].iterdir()):
        truth = np.asarray(Image.open(folders[1] / image.name)).astype(int) - 1  # 0, "other", does not count
        predicted = segment(model, processor, image)
        right, total = right + int((predicted == truth).sum()), total + int((truth >= 0).sum())
    assert found["aAcc"] == pytest.approx(right / total) and found["pixels"] == total
    assert [row["label"] for row in found["classes"]] == list(CONFIG.labels)
    text = output(capsys, *arguments)
    assert f"mIoU  {100 * found['mIoU']:6.2f} %" in text and "tree" in text


def test_annotations_that_count_from_zero(
    checkpoint: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folders[1].iterdir():
        truth = np.asarray(Image.open(path)).astype(np.int32)
        write_label_map(np.where(truth == 0, 255, truth - 1), path)
    arguments = ["evaluate", checkpoint, "--images", folders[0], "--annotations", folders[1], "--json"]
    found = json.loads(output(capsys, *arguments, "--labels-from-zero"))
    assert 0 < found["mIoU"] < 1


def test_mistakes_in_folders_are_one_line(
    checkpoint: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images, annotations = folders
    arguments = ["evaluate", checkpoint, "--images", images, "--annotations", annotations]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty: no images in this folder" in error(capsys, "evaluate", checkpoint, "--images", empty,
                                                      "--annotations", annotations)  # fmt: skip
    assert "nowhere: expected a folder of annotations (.png), found nothing" in error(
        capsys, "evaluate", checkpoint, "--images", images, "--annotations", tmp_path / "nowhere"
    )
    original = (annotations / "val_1.png").read_bytes()
    write_label_map(np.full((32, 32), 5), annotations / "val_1.png")  # class 5 of 4, counted from 1
    assert "val_1.png: label 4 at row 0, column 0, expected 0 to 3 or 255" in error(capsys, *arguments)
    write_label_map(np.ones((32, 31), np.int32), annotations / "val_1.png")
    message = error(capsys, *arguments)
    assert "val_1.png: 31x32 pixels, but" in message and "has 32x32" in message
    Image.new("RGB", (32, 32)).save(annotations / "val_1.png")
    assert "val_1.png: mode RGB holds colours, expected class numbers" in error(capsys, *arguments)
    (annotations / "val_1.png").write_bytes(original[:60])
    assert "val_1.png: not a readable PNG" in error(capsys, *arguments)
    (annotations / "val_1.png").unlink()
    assert "val_1.png: no such file, the annotation of val_1.png" in error(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to write: give --output PICTURE, --mask FILE, --table FILE or --json"),
        (["-o", "p.gif"], "p.gif: expected a name ending in .png, .jpg or .webp"),
        (["--mask", "m.jpg"], "m.jpg: expected a name ending in .png"),
        (["--json", "--opacity", "2"], "opacity 2.0: expected 0 to 1"),
        (["--json", "--slide", "--whole"], "--slide and --whole were both given"),
        (["--json", "--scales", "0"], "scales: expected numbers above 0"),
        (["--json", "--batch-size", "0"], "batch size: expected a positive integer"),
    ],
)
def test_mistakes_in_options_are_one_line(
    checkpoint: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, "segment", checkpoint, folders[0] / "val_0.png", *arguments)


def test_a_model_for_another_task_is_refused(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.resources import files

    digits = files("beit_jax") / "digits"
    message = error(capsys, "segment", digits, folders[0] / "val_0.png", "--json")
    assert "does not segment (its task is image_classification)" in message


def test_inspect_says_what_it_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "inspect", checkpoint)
    assert "BeitForSemanticSegmentation" in text and "UperNet, 4 classes" in text
    assert "out_indices [0, 1, 2, 3], as trained: hidden states [1, 2, 3, 4]" in text
