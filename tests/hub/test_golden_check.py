"""The comparison of `test_golden.py`, without a network: it accepts right numbers and notices wrong ones."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import numpy as np
import pytest
import reference
import torch
import transformers
from fake_hub import FakeHub
from golden import Golden, check, download
from PIL import Image
from tolerances import MODEL

DIGITS = Path(__file__).parents[2] / "beit_jax" / "digits"
IMAGE = DIGITS / "images" / "00_label_2.png"
RECORDED: dict[str, Any] = json.loads((DIGITS / "expected.json").read_text())["images"][IMAGE.name]
GOLDEN = Golden(
    str(DIGITS), (1, 10), tuple(RECORDED["logits"][:3]), tolerance=MODEL, size=32, argmax=2, labels=("two",)
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as server:
        fake_hub.use(server.url, tmp_path / "cache", monkeypatch)
        yield server
        huggingface_hub.close_session()


def test_pytorchs_logits_are_accepted(hub: FakeHub, tmp_path: Path) -> None:
    """Image and model come from a server, as those of a published checkpoint do."""
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    files = {name: (DIGITS / name).read_bytes() for name in names}
    hub.push("org/digits", files | {"image.png": IMAGE.read_bytes()})
    image = download(f"{hub.url}/org/digits/resolve/main/image.png", tmp_path / "image.png")
    check(replace(GOLDEN, name="org/digits"), image)
    check(replace(GOLDEN, name="org/digits", size=None), image)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (1, 11)},
        {"logits": tuple(logit + 3 * MODEL for logit in RECORDED["logits"][:3])},
        {"logits": (*RECORDED["logits"][:2], RECORDED["logits"][2] - 3 * MODEL)},
        {"argmax": 1},
        {"labels": ("one",)},
        {"labels": ("two", "two")},
        {"size": 64},
    ],
)
def test_a_difference_is_noticed(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check(replace(GOLDEN, **wrong), IMAGE)


def test_masked_patches_are_compared_with_pytorch(tmp_path: Path) -> None:
    model = reference.random_model(task="masked_image_modeling", use_mask_token=True, **reference.TINY)
    directory = reference.save(model, tmp_path / "model")
    processor = transformers.BeitImageProcessorPil.from_pretrained(directory)
    with Image.open(IMAGE) as image:
        pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    with torch.inference_mode():
        logits = model(pixels, bool_masked_pos=torch.ones(1, 16, dtype=torch.bool)).logits.numpy()
    first = tuple(tuple(float(value) for value in row) for row in logits[0, :3, :3])
    golden = Golden(str(directory), (1, 16, 24), first, tolerance=MODEL, size=32, all_masked=True)
    check(golden, IMAGE)
    with pytest.raises(AssertionError):
        check(replace(golden, all_masked=False), IMAGE)
    assert np.ptp(first) > 0.1
