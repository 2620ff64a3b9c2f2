"""The compiled kernels of this machine: found in the user's cache, or built there once.

The environment variable BEIT_JAX_CPU_KERNELS says whether they are used: "auto" (the default: on processors for which
they were measured, if they can be built), "on" (an error if they cannot be built) or "off".
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from beit_jax.errors import BeitJaxError, environment_choice, printable
from beit_jax.kernels.cpu import calls

SWITCH = "BEIT_JAX_CPU_KERNELS"
SOURCES = Path(__file__).parent
PREFIX = "beit_jax_cpu_"
"""How the names begin by which XLA calls the functions."""
CALLS = (
    "affine", "product", "packing", "gelu", "gelu_back", "normalized", "normalized_back", "attention", "attention_back",
    "adamw", "stacked",
)  # fmt: skip
"""The functions of the library, of calls.cpp."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-w")
NEEDED = frozenset({"avx2", "fma"})
ALIGNMENT = 64
"""Bytes: the kernels write whole lines of the caches past them. XLA's arrays begin at multiples of it."""
SECONDS = 300
"""How long a compiler may take."""


_STORED: ContextVar[bool] = ContextVar("stored", default=False)


@contextmanager
def stored_here() -> Iterator[None]:
    """Programs exported within are for this machine alone, and may call the kernels."""
    before = _STORED.set(True)
    try:
        yield
    finally:
        _STORED.reset(before)


def may_be_exported() -> bool:
    """Whether a program that is exported may call the kernels, see `stored_here`."""
    return _STORED.get()


class Found(NamedTuple):
    """What became of the library: the digest of what it was built of, or why there is none."""

    digest: str | None
    reason: str


def available() -> bool:
    """Whether functions are computed by the kernels.

    Raises:
        BeitJaxError: the environment variable has another value than its three, or is "on" and there is no library.
    """
    if unwanted() is not None:
        return False
    found = library()
    if _said() == "on" and found.digest is None:
        raise BeitJaxError(f"{SWITCH}=on: {found.reason}; set it to auto to compute without these kernels")
    return found.digest is not None


def unwanted() -> str | None:
    """Why the kernels are not even looked for; None if they are."""
    if _said() == "off":
        return f"{SWITCH}=off"
    return None if _said() == "on" or measured() else "not for this processor"


def _said() -> str:
    return environment_choice(SWITCH, "auto", "on", "off")


def offer() -> None:
    """Lets `calls` compute by the library, which is looked for when the first product is wide enough."""
    calls.offer(calls.Offer(available, may_be_exported, target, columns))


def state() -> str:
    """One line for people: whether the kernels are used, or why not."""
    if not available():
        return f"XLA's products and attention ({unwanted() or library().reason})"
    return f"kernels built for this processor ({library().reason})"


@cache
def measured() -> bool:
    """Whether this processor is of a kind for which the kernels were found faster than XLA's."""
    return platform.machine() in ("x86_64", "AMD64") and processor().flags >= NEEDED


class Processor(NamedTuple):
    """What Linux says of the first processor."""

    name: str
    flags: frozenset[str]


@cache
def processor() -> Processor:
    """The processor; without name and flags where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return Processor("", frozenset())
    said = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in said.items()}
    identity = [values.get(name, "") for name in ("vendor_id", "cpu family", "model", "stepping", "model name")]
    return Processor(" ".join(identity), frozenset(values.get("flags", "").split()))


def compiler() -> str | None:
    """The compiler: of the environment variable CXX, or else g++ or clang++."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))), None)


@cache
def library() -> Found:
    """Loads the library, once in a process; builds it first where the cache has none."""
    program = compiler()
    if program is None:
        return Found(None, "no C++ compiler was found: install g++, or set CXX")
    digest = _digest(program)
    path = directory() / f"{digest}.so"
    try:
        if not path.is_file():
            build(program, (*FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCES / "calls.cpp")), path)
        calls = ctypes.CDLL(str(path))
        for name in CALLS:
            jax.ffi.register_ffi_target(target(name, digest), jax.ffi.pycapsule(getattr(calls, f"beit_{name}")), "cpu")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return Found(None, f"building the CPU kernels failed: {complaint(error)}")
    return Found(digest, str(path))


def target(name: str, digest: str | None = None) -> str:
    """What XLA calls a function. Programs that were compiled with other sources call another name."""
    return f"{PREFIX}{name}_{digest or library().digest}"


def columns() -> int:
    """How many columns a panel of a packed kernel has, which the width of registers decides."""
    return int(ctypes.CDLL(library().reason).beit_columns())


def pack_in_place(kernels: Float[np.ndarray, "layers k n"]) -> Float[np.ndarray, "layers panels k columns"]:
    """The panels of kernels, where the kernels were.

    Args:
        kernels: contiguous, aligned to `ALIGNMENT` bytes; n is a multiple of `columns`.
    """
    layers, k, n = kernels.shape
    call = ctypes.CDLL(library().reason).beit_pack_in_place
    threads = 2  # more would wait for memory
    call(ctypes.c_void_p(kernels.ctypes.data), *map(ctypes.c_int64, (layers, k, n, threads)))
    return kernels.reshape(layers, n // columns(), k, columns())


def targets() -> list[str]:
    """What XLA may call; nothing is built to say it."""
    return [target(name, identity()) for name in CALLS]


def identity() -> str:
    """The digest of the library that would be used, whether it is built yet or not; "none" for none."""
    program = compiler()
    return "none" if program is None or unwanted() is not None else _digest(program)


def directory() -> Path:
    """Where libraries are kept: beit-jax in the user's cache (XDG_CACHE_HOME)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "beit-jax", "kernels")


def build(program: str, arguments: Sequence[str], path: Path) -> None:
    """Compiles a library beside its place and moves it there: processes that build it at once all succeed.

    Raises:
        OSError: a file cannot be written.
        subprocess.SubprocessError: the compiler failed, see `complaint`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        command = [program, *arguments, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        os.replace(made, path)


def complaint(error: Exception) -> str:
    """What a compiler that failed says is wrong, in one line."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in (text or "").splitlines() if "error" in line] or (text or "").splitlines()
    return printable(lines[0] if lines else type(error).__name__)


@cache
def _digest(program: str) -> str:
    """Of all that the library depends on: sources, flags, compiler, jaxlib's headers, processor."""
    status = os.stat(program)
    parts: Sequence[object] = (
        *FLAGS, program, status.st_size, status.st_mtime_ns, version("jaxlib"), processor().name,
        sorted(processor().flags),
    )  # fmt: skip
    digest = hashlib.sha256(repr(parts).encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
