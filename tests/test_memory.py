"""Memory that a process keeps."""

import atexit
import ctypes
import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest

from beit_jax import keep_freed_memory, memory
from beit_jax.cli import main as __main__
from beit_jax.memory import imports, leave_objects

# Temporaries of 64 MiB and more in every call: 16,384 pages. Blocks differ in order and thread from call to call, so
# that a few calls, most of them early, let the heap grow by whole blocks: what counts is the median call.
FAULTS = """
import statistics
import sys
from resource import RUSAGE_SELF, getrusage

from beit_jax import keep_freed_memory

if sys.argv[1:] == ["kept"]:
    assert keep_freed_memory({})

import jax
import jax.numpy as jnp

@jax.jit
def summed(x):
    return jnp.cumsum(jnp.tile(x, 2**14)).max()

def call():
    before = getrusage(RUSAGE_SELF).ru_minflt
    summed(x).block_until_ready()
    return getrusage(RUSAGE_SELF).ru_minflt - before

x = jnp.arange(1024, dtype=jnp.float32)
print(statistics.median_low([call() for _ in range(60)]))
"""

# A block of 128 MiB comes and goes. While it is there, small ones are allocated that stay. Prints the peak in blocks.
BLOCKS = """
import ctypes
import sys

from beit_jax import keep_freed_memory
from beit_jax.memory import Heap

assert keep_freed_memory({})
libc, size, heap = ctypes.CDLL(None), 2**27, Heap()
libc.aligned_alloc.restype = libc.malloc.restype = ctypes.c_void_p
for i in range(12):
    block = libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    for small in (40, 100, 1000, 100_000):
        libc.malloc(ctypes.c_size_t(small + 16 * i))
    libc.free(ctypes.c_void_p(block))
    if sys.argv[1:] == ["settled"]:
        heap.settle()
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / size)
"""
has_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_kept", False)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What a C library that obeys has been told; this process's own hears nothing of it."""
    heard = []

    def mallopt(parameter: int, value: int) -> int:
        heard.append((parameter, value))
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    return heard


def page_faults(*arguments: str) -> int:
    """Of the median call of a compiled function, in a new process."""
    return int(subprocess.check_output([sys.executable, "-c", FAULTS, *arguments], text=True))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.thorough
def test_a_call_finds_the_memory_of_the_last_one() -> None:
    assert page_faults() > 16_000
    assert page_faults("kept") < 16


@has_glibc
def test_a_block_finds_its_place_in_a_settled_heap() -> None:
    def peak(*arguments: str) -> float:
        return float(subprocess.check_output([sys.executable, "-c", BLOCKS, *arguments], text=True))

    assert peak("settled") < 2 < 3 < peak()


def test_another_heap_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # without a function to call
    memory.Heap().settle()
    monkeypatch.setattr(memory, "_kept", True)
    memory.Heap().settle()


def test_the_heap_of_a_process_that_does_not_keep_memory_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    library = SimpleNamespace(mallinfo2=lambda: calls.append("asked"), malloc=calls.append, free=calls.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.Heap().settle()
    assert calls == []


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(name: str, told: list[tuple[int, int]]) -> None:
    assert not keep_freed_memory({name: "1"})
    assert told == []
    assert keep_freed_memory({"HOME": "/", "MALLOC": "1"})
    assert len(told) == 4


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=lambda parameter, value: 0)])
def test_another_allocator_is_left_alone(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert not keep_freed_memory({})


def test_the_command_keeps_memory_of_its_own_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(__main__, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(atexit, "register", calls.append)
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    assert calls == []
    monkeypatch.setattr(sys, "argv", ["beit-jax", "--help"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert calls == ["kept", leave_objects]


def test_imports_are_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jax")
    frozen = gc.get_freeze_count()
    with pytest.raises(RuntimeError), imports():
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled() and gc.get_freeze_count() > frozen
    gc.unfreeze()


def test_a_process_that_has_imported_jax_collects_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", sys)
    frozen = gc.get_freeze_count()
    with imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("triton", [False, True])
def test_a_process_ends_without_a_collection_unless_triton_would_complain(
    triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    if triton:
        monkeypatch.setitem(sys.modules, "triton", sys)
    frozen = gc.get_freeze_count()
    leave_objects()
    assert (gc.get_freeze_count() > frozen) != triton
    gc.unfreeze()
