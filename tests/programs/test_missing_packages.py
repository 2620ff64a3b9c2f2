"""Without the packages of an extra, one line says how to install them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beit_jax.cli.main import main


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx(
    package: str,
    native: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):  # those before it are there, whatever is installed
        monkeypatch.setitem(sys.modules, name, None if name == package else pytest)
    assert main(["export", str(native()), str(tmp_path / "written"), "--to", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {package} is not installed; pip install 'beit-jax[onnx]'\n"
    assert not (tmp_path / "written").exists()
