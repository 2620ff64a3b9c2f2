"""Options that a command would otherwise ignore: each is used, or refused at once. A row is a command line."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit_jax.cli.main import main
from beit_jax.convert import tokenizers
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.dvae import DvaeEncoderConfig

DIGITS = str(files("beit_jax") / "digits")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands in the rows for a path: DIGITS, NATIVE, TOKENIZER, OUT."""
    directory = tmp_path_factory.mktemp("places")
    config = DvaeEncoderConfig(n_hid=8, vocab_size=16, group_count=2, n_blk_per_group=1)
    draw = np.random.default_rng(0)
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in tokenizer_shapes(config).items()}
    tensors = tokenizers.to_torch(config, params)
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, directory / "encoder.pth")
    native = directory / "native"
    assert main(["convert", DIGITS, str(native)]) == 0
    return {
        "DIGITS": DIGITS,
        "NATIVE": str(native),
        "TOKENIZER": str(directory / "encoder.pth"),
        "OUT": str(directory / "out"),
    }


# The command line, and what the error names.
ROWS: list[tuple[str, list[str]]] = [
    ("convert TOKENIZER OUT --variant beit_base_patch16_224", ["--variant", "tokenizer"]),
    ("convert TOKENIZER OUT --image-size 64", ["--image-size", "tokenizer"]),
    ("convert TOKENIZER OUT --patch-size 8", ["--patch-size", "tokenizer"]),
    ("convert TOKENIZER OUT --position-bias per_layer", ["--position-bias", "tokenizer"]),
    ("convert TOKENIZER OUT --position-resize geometric", ["--position-resize", "tokenizer"]),
    ("convert TOKENIZER OUT --image-preset hf", ["--image-preset", "tokenizer"]),
    ("convert TOKENIZER OUT --num-heads 2", ["--num-heads", "tokenizer"]),
    ("convert TOKENIZER OUT --expect-sha256 deadbeef", ["encoder.pth", "deadbeef expected"]),
    ("inspect TOKENIZER --expect-sha256 deadbeef", ["encoder.pth", "deadbeef expected"]),
    ("convert DIGITS OUT --expect-sha256 deadbeef", ["model.safetensors", "deadbeef expected"]),
    ("convert DIGITS OUT --expect-sha256 no-digest", ["--expect-sha256", "hexadecimal"]),
    ("convert DIGITS OUT --patch-size 0", ["--patch-size", "expected 1 to", "found 0"]),
    ("convert DIGITS OUT --image-size 0", ["--image-size", "found 0"]),
    ("convert DIGITS OUT --image-size -32", ["--image-size", "-32"]),
    ("convert DIGITS OUT --image-size 100000000", ["--image-size", "100000000"]),
    ("convert DIGITS OUT --variant beit_base_patch16_225", ["--variant", "did you mean beit_base_patch16_224?"]),
    ("inspect NATIVE --weights ema", ["--weights", "native"]),
    ("inspect NATIVE --expect-sha256 deadbeef --image-size 32", ["--image-size, --expect-sha256", "leave them out"]),
    ("parity DIGITS --batch 100000", ["--batch", "at most 1,024", "found 100000"]),
    ("parity DIGITS --image x.png --batch 5", ["--batch", "--image"]),
    ("evaluate DIGITS --data nowhere --workers 100000", ["--workers", "at most 1,024"]),
    ("evaluate DIGITS --data nowhere --workers -3", ["--workers", "at least 0"]),
    ("evaluate DIGITS --data nowhere --eval-batch-size 999999999999", ["--eval-batch-size", "at most 4,096"]),
    # Before anything is looked for or downloaded.
    ("convert no-owner/no-model OUT --patch-size 0", ["--patch-size", "found 0"]),
    ("convert no-owner/no-model OUT --variant beit", ["--variant", "beit"]),
]


@pytest.mark.parametrize(("line", "needles"), ROWS, ids=[line for line, _ in ROWS])
def test_refused(places: dict[str, str], capsys: pytest.CaptureFixture[str], line: str, needles: list[str]) -> None:
    arguments = [places.get(word, word) for word in line.split()]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    for needle in needles:
        assert needle in captured.err
    assert not Path(places["OUT"]).exists()


def test_a_tokenizer_is_checked_and_recorded_as_a_model_is(places: dict[str, str], tmp_path: Path) -> None:
    from beit_jax.tokenizers.checkpoint import read_tokenizer

    digest = _sha256(places["TOKENIZER"])
    given: list[Any] = ["--sha256", "--expect-sha256", digest[:8]]
    assert main(["convert", places["TOKENIZER"], str(tmp_path / "out"), *given]) == 0
    provenance = read_tokenizer(tmp_path / "out").provenance
    assert provenance["files"] == {"encoder.pth": digest}
    assert provenance["options"] == {"sha256": True, "expect_sha256": digest[:8]}


def _sha256(path: str) -> str:
    import hashlib

    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
