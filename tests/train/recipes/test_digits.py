"""The digits recipe as a newcomer runs it: prepare, train from a random start, evaluate, export, PyTorch agrees."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from beit_jax.train.data.datasets import open_dataset


def beit_jax(*arguments: object) -> dict[str, object]:
    """A command's JSON."""
    command = [sys.executable, "-m", "beit_jax", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_digits_from_a_random_start(tmp_path: Path) -> None:
    """At least 97 % of the held-out images; transformers gets the same answers from the exported model."""
    data, run, exported = tmp_path / "digits", tmp_path / "run", tmp_path / "exported"
    beit_jax("prepare", "digits", data)
    outcome = beit_jax("train", "digits_finetune", "--data", data, "--out", run)
    assert outcome["scores"]["accuracy"] >= 0.97
    assert outcome["timing"]["input_wait"] < 0.05
    ours = beit_jax("evaluate", run / "model", "--data", data)
    assert ours["top1"] == outcome["scores"]["accuracy"]

    command = [sys.executable, "-m", "beit_jax", "export", str(run / "model"), str(exported)]
    subprocess.run(command, check=True, capture_output=True)
    model = transformers.AutoModelForImageClassification.from_pretrained(exported).eval()
    processor = transformers.BeitImageProcessorPil.from_pretrained(exported)
    held_out = open_dataset(data, "validation")
    images, labels = zip(*(held_out.load(i) for i in range(len(held_out))), strict=True)
    with torch.no_grad():
        logits = model(**processor(list(images), return_tensors="pt")).logits.numpy()
    assert float(np.mean(logits.argmax(axis=1) == np.array(labels))) == ours["top1"]
