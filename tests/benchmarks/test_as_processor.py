"""Commands that are told of another processor."""

import subprocess
import sys
from pathlib import Path

import as_processor
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu import library

needs_faults = pytest.mark.skipif(
    library.compiler() is None or not library.processor().flags >= {"cpuid_fault", "avx512f"},
    reason="no compiler, or a processor that does not let cpuid fault",
)
SCRIPT = [sys.executable, as_processor.__file__]


@needs_faults
@pytest.mark.parametrize("name", as_processor.NAMES)
def test_libraries_and_compilers_take_their_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import subprocess, sys, torch; print(torch.backends.cpu.get_cpu_capability());"
        "print(subprocess.check_output([sys.argv[1], '-march=native', '-dM', '-E', '-'], input='', text=True))"
    )
    compiler = library.compiler()
    assert compiler is not None
    command = [*SCRIPT, name, sys.executable, "-c", code, compiler]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wide = name.endswith("avx512")
    assert printed[0] == ("AVX512" if wide else "AVX2")
    macros = {line.split()[1] for line in printed[1:] if line}
    assert "__AVX2__" in macros and ("__AVX512F__" in macros) == wide
    assert ("__znver3__" in macros or "__znver5__" in macros) == name.startswith("amd")


@needs_faults
def test_a_program_keeps_its_own_handler_of_faults() -> None:
    code = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"
    run = subprocess.run([*SCRIPT, "avx2", sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "Fatal Python error: Segmentation fault" in run.stderr


def test_without_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "processor", lambda: library.Processor("", frozenset()))
    with pytest.raises(BeitJaxError, match="amd-avx512: this machine has no avx512f; take another one"):
        as_processor.environment("amd-avx512")


@pytest.mark.parametrize("arguments", [[], ["avx2"], ["z80", "true"]])
def test_usage(arguments: list[str]) -> None:
    run = subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("usage: as_processor.py {avx2,amd-avx2,amd-avx512} COMMAND")
