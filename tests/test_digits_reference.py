"""The embedded checkpoint is what `reference/make_digits.py` says it is, judged by transformers itself."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import BeitForImageClassification, BeitImageProcessorPil

TESTS = Path(__file__).parent
DIGITS = TESTS.parent / "beit_jax" / "digits"
LOGITS_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((DIGITS / "expected.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_digits", TESTS / "reference" / "make_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_reference() -> tuple[BeitImageProcessorPil, BeitForImageClassification]:
    model = BeitForImageClassification.from_pretrained(DIGITS).eval()
    return BeitImageProcessorPil.from_pretrained(DIGITS), model


def transformers_logits(images: list[Image.Image]) -> np.ndarray:
    """float32 [b, 10] from the files in the directory alone."""
    processor, model = load_reference()
    with torch.inference_mode():
        return model(processor(images, return_tensors="pt").pixel_values).logits.numpy()


def test_transformers_gives_the_recorded_logits_and_accuracy(expected: dict[str, Any]) -> None:
    rows = list(expected["images"].values())
    logits = transformers_logits([Image.open(DIGITS / "images" / name) for name in expected["images"]])
    recorded = np.array([row["logits"] for row in rows])

    assert recorded.shape == (50, 10)
    assert np.array_equal(recorded, recorded.astype(np.float32)), "the text does not hold the float32 exactly"
    assert np.abs(logits - recorded).max() <= LOGITS_TOLERANCE
    assert (logits.argmax(-1) == [row["label"] for row in rows]).sum() == expected["images_correct"]


def test_held_out_accuracy_is_the_recorded_one(expected: dict[str, Any], script: ModuleType) -> None:
    training, held_out = script.split_digits()
    assert (len(training), len(held_out)) == (expected["training_size"], expected["held_out_size"])

    predicted = transformers_logits([image for image, _ in held_out]).argmax(-1)
    correct = int((predicted == [label for _, label in held_out]).sum())
    assert correct == expected["held_out_correct"]
    assert correct / len(held_out) == expected["held_out_accuracy"] >= 0.97


def test_images_are_the_first_five_of_every_class_held_out(expected: dict[str, Any], script: ModuleType) -> None:
    _, held_out = script.split_digits()
    seen: Counter[int] = Counter()
    first_five = []
    for image, label in held_out:
        seen[label] += 1
        if seen[label] <= 5:
            first_five.append((f"{len(first_five):02d}_label_{label}.png", label, image.tobytes()))

    stored = []
    for name, row in expected["images"].items():
        with Image.open(DIGITS / "images" / name) as image:
            assert (image.size, image.mode) == ((8, 8), "L")
            stored.append((name, row["label"], image.tobytes()))
    assert stored == first_five


def test_no_image_was_trained_on(expected: dict[str, Any], script: ModuleType) -> None:
    training, _ = script.split_digits()
    trained_on = {image.tobytes() for image, _ in training}
    for name in expected["images"]:
        with Image.open(DIGITS / "images" / name) as image:
            assert image.tobytes() not in trained_on, name


@torch.inference_mode()
def test_every_tensor_matters_to_the_logits(expected: dict[str, Any]) -> None:
    """Each tensor in turn back at the constant it started from: a conversion that lost it must be plainly visible."""
    processor, model = load_reference()
    images = [Image.open(DIGITS / "images" / name) for name in expected["images"]]
    pixel_values = processor(images, return_tensors="pt").pixel_values
    trained = model(pixel_values).logits
    for name, parameter in model.named_parameters():
        value = parameter.clone()
        parameter.fill_(0.1 if "lambda" in name else float("layernorm" in name and name.endswith("weight")))
        change = float((model(pixel_values).logits - trained).abs().max())
        parameter.copy_(value)
        assert change > 100 * LOGITS_TOLERANCE, f"{name} changes the logits by {change:.1e} only"


def test_every_row_of_the_tables_was_learned() -> None:
    tensors = load_file(DIGITS / "model.safetensors")
    tables = [tensors[name] for name in sorted(tensors) if name.endswith("relative_position_bias_table")]
    untouched = [set(np.flatnonzero(~table.any(axis=-1)) - len(table)) for table in tables]
    # Nothing reads the class token after the last layer, so its queries there (the rows class-to-patch and
    # class-to-class, third and first from the end) get no gradient.
    assert untouched == [set(), set(), set(), {-3, -1}]


def test_the_directory_holds_these_files_and_stays_small(expected: dict[str, Any]) -> None:
    files = {path.relative_to(DIGITS).as_posix(): path.stat().st_size for path in DIGITS.rglob("*") if path.is_file()}
    checkpoint = {"config.json", "model.safetensors", "preprocessor_config.json", "expected.json"}
    assert set(files) == checkpoint | {f"images/{name}" for name in expected["images"]}
    assert sum(files.values()) < 1_000_000
