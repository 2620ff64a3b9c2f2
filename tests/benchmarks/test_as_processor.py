"""Commands that are told of another processor."""

import os
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


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, as if it let `cpuid` fault."""
    monkeypatch.setattr(library, "processor", lambda: library.Processor("", frozenset({"cpuid_fault", "avx512f"})))


@pytest.mark.usefixtures("faults")
def test_what_is_preloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is found from every folder, and what the user preloads comes behind it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("LD_PRELOAD", "/lib/of-the-user.so")
    first, second = as_processor.environment("avx2")["LD_PRELOAD"].split()
    assert Path(first).is_absolute() and Path(first).is_relative_to(tmp_path) and Path(first).is_file()
    assert second == "/lib/of-the-user.so"


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("folder", ["a cache", "a:cache"])
def test_folders_that_linkers_do_not_preload_from(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    with pytest.raises(BeitJaxError, match=f"{folder}/beit-jax/as/avx2: the dynamic linker cannot preload from there"):
        as_processor.environment("avx2")
    assert not (tmp_path / folder).exists()


@pytest.mark.usefixtures("faults")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    with pytest.raises(
        BeitJaxError, match="/as/avx2: Not a directory; set XDG_CACHE_HOME to a folder that can be written"
    ):
        as_processor.environment("avx2")


@pytest.mark.usefixtures("faults")
def test_a_program_that_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program"
    program.write_text("no program")
    program.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stopped:
        as_processor.main(["avx2", str(program)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{program}: Exec format error\n"


@pytest.mark.usefixtures("faults")
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho note >&2; echo 'fatal error: no such header' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = "cannot compile as_processor.cpp: fatal error: no such header; name another compiler in CXX"
    with pytest.raises(BeitJaxError, match=told):
        as_processor.environment("avx2")
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("arguments", [[], ["avx2"], ["z80", "true"]])
def test_usage(arguments: list[str]) -> None:
    run = subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("usage: as_processor.py {avx2,amd-avx2,amd-avx512} COMMAND")
