"""Options that a command would not use, and numbers that it could not: refused at once, in one line that names them.

A row is a command that must fail, and the words that its line must have. No checkpoint is read before: the rows name
one that does not exist, so whatever loads it first would say something else.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_jax.cli.main import main

ROWS: list[tuple[list[str], list[str]]] = [
    (["classify", "NO", "a.png", "--top", "0"], ["--top", "0"]),
    (["classify", "NO", "a.png", "--top", "-1"], ["--top", "-1"]),
    (["classify", "NO", "a.png", "--batch-size", "0"], ["--batch-size", "0"]),
    (["classify", "NO", "a.png", "--batch-size", "-5"], ["--batch-size", "-5"]),
    (["classify", "NO", "a.png", "--max-bad", "0.5"], ["--max-bad", "--skip-bad"]),
    (["classify", "NO", "a.png", "--skip-bad", "--max-bad", "0"], ["--max-bad", "0.0"]),
    (["classify", "NO", "a.png", "--skip-bad", "--max-bad", "nan"], ["--max-bad", "nan"]),
    (["features", "NO", "a.png", "-o", "f.npz", "--batch-size", "0"], ["--batch-size", "0"]),
    (["features", "NO", "a.png", "-o", "f.npz", "--max-bad", "0.5"], ["--max-bad", "--skip-bad"]),
    (["segment", "NO", "a.png", "--mask", "m.png", "--opacity", "0.5"], ["--opacity", "--output"]),
    (["segment", "NO", "a.png", "--mask", "m.png", "--batch-size", "0"], ["batch size", "0"]),
    (["segment", "NO", "a.png", "--mask", "m.png", "--slide", "--whole"], ["--slide", "--whole"]),
    (["reconstruct", "NO", "a.png", "--tokenizer", "NO", "--decoder", "NO", "--seed", "-1"], ["--seed", "-1"]),
    (["reconstruct", "NO", "a.png", "--tokenizer", "NO", "--decoder", "NO", "--mask-patches", "0"], ["--mask-patches"]),
    (["plot", "attention", "NO", "a.png", "--class-token", "--patch", "1", "1"], ["--class-token", "--patch"]),
    (["evaluate", "NO", "--data", "data", "--workers", "-3"], ["--workers", "-3"]),
    (["evaluate", "NO", "--data", "data", "--eval-batch-size", "0"], ["--eval-batch-size", "0"]),
    (["evaluate", "NO", "--data", "data", "--slide"], ["--slide", "--data"]),
    (["evaluate", "NO", "--data", "data", "--whole"], ["--whole", "--data"]),
    (["evaluate", "NO", "--data", "data", "--flip"], ["--flip", "--data"]),
    (["evaluate", "NO", "--data", "data", "--scales", "1"], ["--scales", "--data"]),
    (["evaluate", "NO", "--data", "data", "--as-trained"], ["--as-trained", "--data"]),
    (["evaluate", "NO", "--data", "data", "--batch-size", "2"], ["--batch-size", "--data"]),
    (["evaluate", "NO", "--data", "data", "--labels-from-zero"], ["--labels-from-zero", "--data"]),
    (["evaluate", "NO", "--data", "data", "--labels-from-one"], ["--labels-from-one", "--data"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--split", "test"], ["--split"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--preset", "hf"], ["--preset"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--real", "r.json"], ["--real"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--confusion", "c.png"], ["--confusion"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--per-class"], ["--per-class"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--workers", "0"], ["--workers"]),
    (["evaluate", "NO", "--images", "data", "--annotations", "data", "--eval-batch-size", "9"], ["--eval-batch-size"]),
    (["prepare", "digits", "new", "--held-out", "7"], ["--held-out", "7"]),
    (["prepare", "digits", "new", "--held-out", "0.2"], ["--held-out", "digits"]),
    (["prepare", "digits", "new", "--skip-bad"], ["--skip-bad"]),
    (["prepare", "digits", "new", "--held-out", "7", "--skip-bad"], ["digits"]),
    (["prepare", "imagenet", "data", "new", "--held-out", "0.2"], ["--held-out", "imagenet"]),
    (["prepare", "ade20k", "data", "new", "--held-out", "0.2"], ["--held-out", "ade20k"]),
    (["prepare", "folder", "data", "new", "--held-out", "1"], ["--held-out", "1.0"]),
    (["prepare", "folder", "data", "new", "--held-out", "nan"], ["--held-out", "nan"]),
    (["prepare", "folder", "split", "new", "--held-out", "0.2"], ["--held-out", "val"]),
    (["prepare", "folder", "data", "new", "--max-bad", "0.2"], ["--max-bad", "--skip-bad"]),
]


@pytest.mark.parametrize(("arguments", "words"), ROWS, ids=[" ".join(arguments) for arguments, _ in ROWS])
def test_an_option_is_used_or_refused(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/cat", "split/train/cat", "split/val/cat"):
        Path(name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(Path(name, "1.png"))
    Path("a.png").write_bytes(Path("data/cat/1.png").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert all(word in captured.err for word in words), captured.err
    assert sorted(tmp_path.rglob("*")) == before
