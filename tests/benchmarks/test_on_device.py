"""The script for a GPU or a TPU, which works where there is none, and tells a wrong kernel."""

import json
from inspect import unwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import on_device
import pytest

from beit_jax.kernels import tpu_rows
from beit_jax.models.attention import attend


def test_its_reference_is_the_textbook_form_in_float64() -> None:
    side, rng = 3, np.random.default_rng(0)
    shapes = (2, 10, 3, 2, 8), ((2 * side - 1) ** 2 + 3, 2), (2, 10, 2, 8)
    qkv, table, upstream = (rng.standard_normal(shape) for shape in shapes)
    true = on_device.exact(qkv, table, upstream, side)
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, (qkv, table, upstream)))
        found = on_device.both_ways(unwrap(attend), side, *given)
    assert len(true) == len(on_device.NAMES)
    for mine, textbook in zip(true, found, strict=True):
        assert mine.shape == textbook.shape
        assert on_device.apart(np.asarray(textbook), mine) < 1e-6  # the textbook form's scores are float32


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_kernels_are_compared_and_a_wrong_one_is_told(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, device = on_device.QUICK_ATTENTION[0], jax.devices()[0]
    found = on_device.compared(size, "bfloat16", target, device, quick=True)
    assert found["kernels"] == target and not on_device.is_wrong(found)
    assert "right" in next(on_device.attention_lines(found))
    if target == "tpu":
        right = tpu_rows.forward
        monkeypatch.setattr(tpu_rows, "forward", lambda *given, **options: 1.1 * right(*given, **options))
        wrong = on_device.compared(size, "bfloat16", target, device, quick=True)
        assert on_device.is_wrong(wrong) and "WRONG" in next(on_device.attention_lines(wrong))
        monkeypatch.setattr(tpu_rows, "forward", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # of this program, not of a compiler
            on_device.compared(size, "bfloat16", target, device, quick=True)


def test_what_does_not_end_in_time_is_said() -> None:
    device: dict[str, Any] = {"platform": "gpu", "peak": None}
    rows = list(on_device.models(device, 0.0, quick=True))
    assert [row["left_out"] for row in rows] == ["no time is left"] * len(on_device.QUICK_MODELS)
    assert "left out, no time is left" in next(on_device.model_lines(rows[0]))


@pytest.mark.thorough
def test_it_runs_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert on_device.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"]["platform"] == "cpu"
    assert [row["kernels"] for row in found["attention"]] == ["tpu", "gpu"] * 2
    assert [row["case"] for row in found["models"]] == [case.name for case in on_device.QUICK_MODELS]
    assert all(row["contenders"]["ours"]["seconds"] > 0 for row in found["models"])
    assert "0 kernels wrong, 0 models failed" in capsys.readouterr().out


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"kind": "cpu", "platform": "cpu", "devices": 1, "memory": None, "peak": None}
    monkeypatch.setattr(on_device, "child", lambda *_: (row for row in [cpu]))
    assert on_device.main([]) == 2
    assert "no GPU and no TPU here" in capsys.readouterr().err
