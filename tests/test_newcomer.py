"""A newcomer follows the README from a clone to a model that PyTorch reads, by the commands that stand there alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from documents import ROOT, blocks

from beit_jax.train.data.datasets import open_dataset

FIRST, PATH = "## Two commands", "## From a checkpoint to a trained model and back"
PIP = re.compile(r"\. \.venv/bin/activate|pip install\b|python3 -m venv\b")


def section(heading: str) -> str:
    """The first block of commands below a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    return next(blocks(text)).code


def walk(directory: Path, *codes: str) -> str:
    """What the commands print; each of them must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    command = ["bash", "-c", "set -euo pipefail\n" + "\n".join(codes)]
    done = subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        env=environment,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def check(printed: str, directory: Path) -> None:
    """The demo's verdict, parity's, and that the exported model answers as the evaluated one does."""
    assert "logits       equal: at most " in printed and "classified   50 of 50" in printed
    assert "all stages agree with PyTorch" in printed
    before, top1 = (float(found) for found in re.findall(r"^top-1 +([\d.]+) %", printed, re.MULTILINE))
    assert before < 65.0 and top1 >= 95.0
    model = transformers.AutoModelForImageClassification.from_pretrained(directory / "for-torch").eval()
    processor = transformers.BeitImageProcessorPil.from_pretrained(directory / "for-torch")
    held_out = open_dataset(directory / "digits", "validation")
    images, labels = zip(*(held_out.load(i) for i in range(len(held_out))), strict=True)
    with torch.no_grad():
        logits = model(**processor(list(images), return_tensors="pt")).logits.numpy()
    assert round(100 * float(np.mean(logits.argmax(axis=1) == np.array(labels))), 2) == top1


def test_the_path_is_complete() -> None:
    """It begins by installing, and goes through every station."""
    lines = section(PATH).splitlines()
    assert all(PIP.match(line) for line in lines[:2]) and all(line.startswith("beit-jax ") for line in lines[2:])
    verbs = [line.split()[1] for line in lines[2:]]
    assert verbs == ["inspect", "parity", "convert", "prepare", "evaluate", "train", "evaluate", "export"]
    assert PIP.match(section(FIRST)) and section(FIRST).strip().endswith(".venv/bin/beit-jax demo")


@pytest.mark.thorough
def test_in_this_environment(tmp_path: Path) -> None:
    """Everything but the installation."""
    (tmp_path / "beit_jax").mkdir()
    (tmp_path / "beit_jax" / "digits").symlink_to(ROOT / "beit_jax" / "digits")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "beit-jax"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m beit_jax "$@"\n')
    command.chmod(0o755)
    first = section(FIRST).rpartition("&& ")[2]
    rest = "".join(line for line in section(PATH).splitlines(keepends=True) if not PIP.match(line))
    check(walk(tmp_path, first, 'PATH="$PWD/.venv/bin:$PATH"', rest), tmp_path)


@pytest.mark.slow
def test_in_a_fresh_one(tmp_path: Path) -> None:
    """A clone of the last commit, and an environment of its own, which pip fills from the network or from its cache."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    check(walk(clone, section(FIRST), section(PATH)), clone)
