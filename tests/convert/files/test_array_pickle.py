"""Pickles of arrays, `paddle.save`'s above all: what is read, and what is refused and never run."""

import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit_jax.cli.main import main
from beit_jax.convert.files.checkpoint import Checkpoint, open_checkpoint
from beit_jax.errors import BeitJaxError

MARK = "StructuredToParameterName@@"


def opened(path: Path, content: object, protocol: int = 4) -> Checkpoint:
    path.write_bytes(pickle.dumps(content, protocol))
    return open_checkpoint(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pdparams"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_order_type_and_protocol(protocol: int, path: Path) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((40, 30, 2)).astype(np.float32)  # longer than what stays in memory
    arrays = {
        "by rows": matrix,
        "by columns": np.asfortranarray(matrix),
        "turned": matrix.T,
        "half": matrix.astype(np.float16),
        "double": matrix.astype(np.float64),
        "short": matrix[0, :3],
        "one": np.array(3.0, np.float32),
        "none": matrix[:0],
        "integers": np.arange(300),
        "twice": matrix,
        "truths": np.array([True, False]),
    }
    with opened(path, {**arrays, MARK: dict.fromkeys(arrays, "linear_0.w_0")}, protocol) as checkpoint:
        assert checkpoint.format == "paddle pickle" and checkpoint.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            found = checkpoint.read(name)
            assert found.dtype == array.dtype and found.flags.c_contiguous
            assert np.array_equal(found, array)


def test_bits_of_bfloat16(path: Path) -> None:
    with opened(path, {"w": np.array([0x3F80, 0xC000], np.uint16)}) as checkpoint:
        found = checkpoint.read("w")
    assert found.dtype.name == "bfloat16" and found.astype(np.float32).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_tensor_in_parts(protocol: int, path: Path) -> None:
    """Paddle cuts tensors of a gibibyte with protocols 2 and 3 (paddle 3.3.1 framework/io_utils.py)."""
    whole = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    parts = {f"w@@.{i}": part for i, part in enumerate(np.split(whole.reshape(-1), [250, 500]))}
    cut = {"OriginShape": whole.shape, "slices": list(parts)}
    first, *others = parts.items()
    content = dict([first, ("b", np.ones(2)), *others, (MARK, {}), ("UnpackBigParamInfor@@", {"w": cut})])
    with opened(path, content, protocol) as checkpoint:
        assert checkpoint.tensors.keys() == {"w", "b"}
        assert np.array_equal(checkpoint.read("w"), whole)
        assert np.array_equal(checkpoint.read("b"), np.ones(2))
    for wrong in ({"OriginShape": (30, 21)}, {"slices": ["w@@.0", "w@@.1"]}, {"slices": [*parts, "w@@.3"]}):
        with pytest.raises(BeitJaxError, match="parts of w that do not make a tensor"):
            opened(path, {**content, "UnpackBigParamInfor@@": {"w": cut | wrong}}, protocol)


def test_the_arrays_stay_in_the_file(path: Path) -> None:
    """A pickle of weights is as long as they are: longer than what other pickles may be, and never in memory."""
    content = {"w": np.zeros((20, 1 << 20), np.float32), MARK: {}}
    with path.open("wb") as file:
        pickle.dump(content, file, 4)
    del content
    tracemalloc.start()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].nbytes == 80 << 20
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


# What is refused. -----------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function, which `pickle.load` would make."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


class Subclass(np.ndarray):
    pass


def nested(evil: object) -> dict[str, object]:
    return {"model": {"w": ("linear_0.w_0", np.ones(2, np.float32)), "x": evil}, "epoch": 1}


PLACES: dict[str, Callable[[object], object]] = {
    "beside the arrays": lambda evil: {"w": np.ones(2, np.float32), "x": evil},
    "in the table of names": lambda evil: {"w": np.ones(2, np.float32), MARK: {"w": evil}},
    "nested": nested,
    "in an array": lambda evil: {"w": np.array([evil, None], object)},
    "at the end of a list": lambda evil: {"w": np.ones(2, np.float32), "list": [1, [2, evil]]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_by_name_and_does_not_run(
    place: str, protocol: int, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = path.with_name("canary")
    calls = Call(os.system, f"touch {canary}"), Call(eval, f"__import__('pathlib').Path({str(canary)!r}).touch()")
    for call, named in zip(calls, ("posix.system", "builtins.eval"), strict=True):
        path.write_bytes(pickle.dumps(PLACES[place](call), protocol))
        assert main(["convert", str(path), str(path.with_name("out"))]) == 2
        message = capsys.readouterr().err
        assert named in message and "Nothing was run" in message and message.count("\n") == 1, message
        assert sorted(each.name for each in path.parent.iterdir()) == ["x.pdparams"]
        pickle.loads(path.read_bytes())  # the canary is live
        assert canary.exists()
        canary.unlink()


def test_other_arrays_are_refused(path: Path) -> None:
    refusals = {
        "Subclass": np.ones(2).view(Subclass),
        "Python objects": np.array([1, None], object),
        ">f4": np.ones(2, ">f4"),
        "c8": np.ones(2, np.complex64),
        "U1": np.array(["a"]),
    }
    for words, array in refusals.items():
        with pytest.raises(BeitJaxError, match=words):
            opened(path, {"w": np.ones(2), "x": array})


def test_other_pickles_are_refused(path: Path) -> None:
    for content in ([np.ones(2)], np.ones(2), {"epoch": 1}, {MARK: {}}, "text"):
        with pytest.raises(BeitJaxError, match=r"expected a state dict"):
            opened(path, content)
    path.write_bytes(pickle.dumps({"w": np.ones(2)}) + b"more")
    with pytest.raises(BeitJaxError, match="4 bytes behind its pickle"):
        open_checkpoint(path)
    # A tensor of torch beside an array, which says that its bytes are the array's.
    tensor = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\7\0\0\0array 0X\3\0\0\0cpuK\1tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"K\0K\1\x85K\1\x85\x89}tR"
    array = pickle.dumps(np.ones(2, np.float32), 2)[2:-1]
    path.write_bytes(b"\x80\2}(X\1\0\0\0w" + array + b"X\1\0\0\0x" + rebuilt + b"u.")
    with pytest.raises(BeitJaxError, match="expected a state dict"):
        open_checkpoint(path)
    loop: list[object] = [np.ones(2)]
    loop.append(loop)
    with opened(path, {"w": np.ones(2), "args": loop}) as checkpoint:  # a pickle may hold itself
        assert checkpoint.tensors.keys() == {"w"}
