"""Native weight files: streamed, readable by the safetensors library, reproducible, and no damage goes unnoticed."""

import json
import os
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from beit_jax import weights
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.weights import LeafSpec, NativeCheckpoint
from beit_jax.weights.tensors import read_tensors

DIGITS = Path(str(files("beit_jax") / "digits"))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MiB = 1 << 20
PROVENANCE = {"source": "a/b", "revision": None, "files": ["model.safetensors"]}
Tensors = dict[str, np.ndarray]


def some_tensors() -> Tensors:
    draw = np.random.default_rng(0)
    return {
        "b/kernel": draw.normal(size=(3, 5)).astype(np.float32),
        "b/bias": draw.normal(size=7).astype(BFLOAT16),
        "a": np.array([0.0, -0.0, 1e-45, np.finfo(np.float32).max, np.inf, np.nan], np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, BFLOAT16),
        "c": draw.normal(size=(2, 1, 3)).astype(np.float32),
    }


def write(path: Path, tensors: Tensors, **provenance: Any) -> Path:
    specs = {name: LeafSpec(array.shape, array.dtype) for name, array in tensors.items()}
    weights.write_tensors(path, specs, lambda name: [[tensors[name]]], provenance or PROVENANCE)
    return path


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Bit for bit: NaN and the sign of zero count too."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def save(directory: Path, tensors: Tensors, provenance: dict[str, Any]) -> Path:
    directory.mkdir()
    config = BeitConfig.from_file(DIGITS / weights.CONFIG)
    processor = ImageProcessor.from_file(DIGITS / weights.PROCESSOR)
    weights.save(directory, NativeCheckpoint(config, processor, tensors, provenance))
    return directory


def load(directory: Path) -> NativeCheckpoint:
    """`weights.load` without the comparison of ``config.json`` with tensors that are none of a model."""
    config = BeitConfig.from_file(directory / weights.CONFIG)
    processor = ImageProcessor.from_file(directory / weights.PROCESSOR)
    return NativeCheckpoint(config, processor, *read_tensors(directory / weights.WEIGHTS))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def position(path: Path, name: str, offset: int = 0) -> int:
    """Where in the file a tensor's byte lies."""
    header, data = split(path)
    return path.stat().st_size - len(data) + header[name]["data_offsets"][0] + offset


def put(path: Path, byte: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        file.write(bytes([value]))


def refusal(action: Callable[[], object], *needles: object) -> None:
    with pytest.raises(BeitJaxError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000, message
    for needle in needles:
        assert str(needle) in message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "w.safetensors", some_tensors())


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A saved checkpoint."""
    return save(tmp_path / "native", some_tensors(), PROVENANCE)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A saved checkpoint of a few hundred bytes, for tests that damage each of them."""
    tensors = {"a": np.array([1, 2], np.float32), "b/c": np.array([[3], [4], [5]], BFLOAT16)}
    return save(tmp_path / "small", tensors, {"source": "x"})


# Writing


def test_the_safetensors_library_reads_it(file: Path) -> None:
    assert_same(load_file(file), some_tensors())
    with safe_open(file, framework="numpy") as found:
        metadata = found.metadata()
    assert metadata.keys() == {"format", "digests", "provenance"} and metadata["format"] == weights.FORMAT
    assert json.loads(metadata["provenance"]) == PROVENANCE


def test_layout_is_sorted_dense_and_aligned(file: Path) -> None:
    header, data = split(file)
    del header["__metadata__"]
    assert list(header) == sorted(some_tensors())
    assert (file.stat().st_size - len(data)) % 8 == 0
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert end == len(data)


NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from([np.dtype(np.float32), BFLOAT16])), max_size=5),
    st.integers(1, 7),
)
def test_any_names_shapes_and_chunks(layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], size: int) -> None:
    draw = np.random.default_rng(0)
    tensors = {
        name: np.frombuffer(draw.bytes(LeafSpec(*spec).nbytes), spec[1]).reshape(spec[0])
        for name, spec in layout.items()
    }

    def chunks(name: str) -> Iterator[np.ndarray]:
        flat = tensors[name].reshape(-1)
        buffer = np.empty(size, flat.dtype)
        for start in range(0, flat.size, size):
            count = min(size, flat.size - start)
            buffer[:count] = flat[start : start + count]
            yield buffer[:count]
            buffer[:count].view(np.uint8)[...] = 0xAA  # chunks may be overwritten once the next one is asked for

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "w.safetensors"
        specs = {name: LeafSpec(*spec) for name, spec in layout.items()}
        weights.write_tensors(path, specs, lambda name: [chunks(name)], {})
        weights.verify(path)
        assert_same(load_file(path), tensors)
        assert weights.read_specs(path) == {name: (shape, str(dtype)) for name, (shape, dtype) in layout.items()}


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    first = write(tmp_path / "first", tensors, source="s", revision="r")
    second = write(tmp_path / "second", dict(reversed(tensors.items())), revision="r", source="s")
    assert first.read_bytes() == second.read_bytes()


def test_memory_stays_at_a_few_chunks(tmp_path: Path) -> None:
    """200 MiB in chunks of 4 MiB, from buffers that each thread uses again."""
    spec, local = LeafSpec((25, MiB), np.dtype(np.float32)), threading.local()
    specs = {str(i): spec for i in range(2)}

    def layers(name: str) -> Iterator[Iterator[np.ndarray]]:
        return map(chunks, range(spec.shape[0]))

    def chunks(layer: int) -> Iterator[np.ndarray]:
        local.buffer = getattr(local, "buffer", np.empty(MiB, np.float32))
        local.buffer[...] = layer
        yield local.buffer

    path = tmp_path / "large"
    try:
        tracemalloc.start()
        weights.write_tensors(path, specs, layers, {})
        weights.verify(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 200 * MiB
    assert peak < 64 * MiB
    with safe_open(path, framework="numpy") as found:
        last = found.get_slice("1")[24:25]
    assert (last == 24).all()
    path.unlink()  # pytest keeps directories of earlier runs


def test_progress_counts_every_byte(file: Path, tmp_path: Path) -> None:
    tensors = some_tensors()
    specs = {name: LeafSpec(array.shape, array.dtype) for name, array in tensors.items()}
    total, written, verified = sum(spec.nbytes for spec in specs.values()), [], []
    weights.write_tensors(tmp_path / "w", specs, lambda name: [[tensors[name]]], {}, written.append)
    weights.verify(tmp_path / "w", verified.append)
    assert sum(written) == sum(verified) == total == sum(array.nbytes for array in tensors.values())


def test_a_failing_reader_ends_the_write(tmp_path: Path) -> None:
    def chunks(name: str) -> Iterator[np.ndarray]:
        yield np.zeros(1, np.float32)
        raise BeitJaxError(f"{name}: sentinel")

    specs = {name: LeafSpec((2,), np.dtype(np.float32)) for name in "ab"}
    refusal(lambda: weights.write_tensors(tmp_path / "w", specs, lambda name: [chunks(name)], {}), "sentinel")


def test_a_failure_ends_all_work(tmp_path: Path) -> None:
    """A failing tensor stops the others between two layers, in whichever thread they are."""
    begun: list[int] = []

    def layers(name: str) -> Iterator[list[np.ndarray]]:
        if name == "failing":
            raise BeitJaxError("sentinel")
        for layer in range(1000):
            begun.append(layer)
            time.sleep(0.01)
            yield [np.zeros(1, np.float32)]

    specs = {name: LeafSpec((1000,), np.dtype(np.float32)) for name in ("a", "b", "failing")}
    refusal(lambda: weights.write_tensors(tmp_path / "w", specs, layers, {}), "sentinel")
    assert len(begun) < 100


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_layers_of_a_tensor_stay_in_order(tmp_path: Path, count: int) -> None:
    """Threads take turns at tensors of unequal numbers of layers; each comes out as if it were alone."""
    tensors = {str(i): np.arange(100.0 * i, 100 * i + 5 * i, dtype=np.float32) for i in range(1, count + 1)}
    specs = {name: LeafSpec(array.shape, array.dtype) for name, array in tensors.items()}
    weights.write_tensors(tmp_path / "w", specs, lambda name: [[row] for row in tensors[name].reshape(-1, 5)], {})
    weights.verify(tmp_path / "w")
    assert_same(load_file(tmp_path / "w"), tensors)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_chunks_must_fill_the_shape(tmp_path: Path, size: int) -> None:
    specs = {"a": LeafSpec((2,), np.dtype(np.float32))}
    with pytest.raises(AssertionError, match="a: "):
        weights.write_tensors(tmp_path / "w", specs, lambda name: [[np.zeros(size, np.float32)]], {})


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: type) -> None:
    refusal(lambda: write(tmp_path / "w", {"x/y": np.zeros(2, dtype)}), "x/y", "float32 or bfloat16", np.dtype(dtype))


# Round trip


def test_save_and_load(native: Path) -> None:
    loaded = load(native)
    assert_same(loaded.params, some_tensors())
    assert loaded.config == BeitConfig.from_file(DIGITS / "config.json")
    assert loaded.processor == ImageProcessor.from_file(DIGITS / "preprocessor_config.json")
    assert loaded.provenance == PROVENANCE
    assert weights.is_native(native) and not weights.is_native(DIGITS) and not weights.is_native(native / "no")
    assert sorted(path.name for path in native.iterdir()) == sorted(
        [weights.CONFIG, weights.PROCESSOR, weights.WEIGHTS]
    )


def test_jax_uses_float32_tensors_as_they_lie(native: Path) -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        for name, leaf in load(native).params.items():
            array = jnp.asarray(leaf, jnp.float32)
            if leaf.dtype == np.float32 and leaf.size:
                assert array.unsafe_buffer_pointer() == leaf.ctypes.data, name
            np.testing.assert_array_equal(array, leaf.astype(np.float32))


def test_saved_again_it_is_the_same(native: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    weights.save(tmp_path / "again", load(native))
    for path in native.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_arrays_in_any_order_in_memory_are_saved_as_they_are(native: Path) -> None:
    """The safetensors library itself writes such arrays wrongly."""
    checkpoint = load(native)
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {"fortran": np.asfortranarray(kernel), "transposed": kernel.T, "strided": kernel[:, ::2]}
    weights.save(native, NativeCheckpoint(checkpoint.config, checkpoint.processor, params))
    loaded = load(native)
    assert loaded.provenance == {}
    for name, array in params.items():
        np.testing.assert_array_equal(loaded.params[name], array)


# Damage


@pytest.mark.parametrize("name", [name for name, array in some_tensors().items() if array.size])
def test_a_flipped_bit_names_its_tensor(native: Path, name: str) -> None:
    path = native / weights.WEIGHTS
    good, size = path.read_bytes(), some_tensors()[name].nbytes
    for byte in {position(path, name, offset) for offset in (0, size // 2, size - 1)}:
        for bit in (0, 7):
            put(path, byte, good[byte] ^ 1 << bit)
            refusal(lambda: weights.verify(path), path, f"{name}: digest")
            refusal(lambda: load(native), path, f"{name}: digest", "convert again")
        put(path, byte, good[byte])


def test_any_flipped_bit_is_noticed(small: Path) -> None:
    """Header included. What is not refused is a change of the provenance, which is for people."""
    path, expected = small / weights.WEIGHTS, load(small)
    good = path.read_bytes()
    start = good.index(b'"provenance":')
    end = good.index(b"}", start)
    for byte in range(len(good)):
        for flipped in (good[byte] ^ 1 << bit for bit in range(8)):
            put(path, byte, flipped)
            try:
                found = load(small)
            except BeitJaxError as error:
                assert str(error).isprintable() and str(path) in str(error)
            else:
                assert_same(found.params, expected.params)
                assert found.provenance != expected.provenance and start < byte < end
        put(path, byte, good[byte])
    assert path.read_bytes() == good


def test_truncation_is_noticed_at_every_length(small: Path) -> None:
    path = small / weights.WEIGHTS
    size = path.stat().st_size
    for length in (size + 1, *reversed(range(size))):
        os.truncate(path, length)
        refusal(lambda: load(small), path, "convert again")
        refusal(lambda: weights.verify(path), path)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage: the header changed."""

    def damage(path: Path) -> None:
        header, data = split(path)
        change(header)
        join(path, header, data)

    return damage


def rename_tensor(header: dict[str, Any]) -> None:
    header["b/kernal"] = header.pop("b/kernel")


def set_digests(value: object) -> Callable[[Path], None]:
    return edited(lambda header: header["__metadata__"].update(digests=value))


def change_digest(path: Path, name: str, digest: object) -> None:
    header, data = split(path)
    digests = json.loads(header["__metadata__"]["digests"])
    digests[name] = digest
    header["__metadata__"]["digests"] = json.dumps(digests)
    join(path, header, data)


def drop_tensor(path: Path) -> None:
    """The last tensor with its bytes: everything else still adds up."""
    header, data = split(path)
    start, _ = header.pop("scalar")["data_offsets"]
    join(path, header, data[:start])


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no file": (lambda path: path.unlink(), ["not a readable safetensors file"]),
    "empty": (lambda path: path.write_bytes(b""), ["not a readable safetensors file"]),
    "text": (lambda path: path.write_text("<html>404</html>"), ["not a readable safetensors file"]),
    "header is no JSON": (lambda path: join(path, b"{not json", b""), ["not a readable safetensors file"]),
    "foreign": (lambda path: save_file(some_tensors(), path), [f'"{weights.FORMAT}"', 'found "none"']),
    "PyTorch's": (
        lambda path: save_file(some_tensors(), path, {"format": "pt"}), [f'"{weights.FORMAT}"', 'found "pt"'],
    ),
    "a hostile format": (
        edited(lambda header: header["__metadata__"].update(format="\x1b[31m\n" + "x" * 5000)),
        [f'"{weights.FORMAT}"', "\\x1b[31m\\n"],
    ),
    "a later format": (
        edited(lambda header: header["__metadata__"].update(format="beit-jax 2")),
        [f'"{weights.FORMAT}"', 'found "beit-jax 2"'],
    ),
    "tensor missing": (drop_tensor, ["scalar", "a digest without a tensor"]),
    "tensor renamed": (edited(rename_tensor), ["b/kernal", "a tensor without a digest"]),
    "two tensors exchanged": (
        edited(lambda header: header.update({"b/kernel": header["c"], "c": header["b/kernel"]})),
        ["b/kernel: digest"],
    ),
    "an integer tensor": (edited(lambda header: header["c"].update(dtype="I32")), ["c: expected F32 or BF16", "I32"]),
    "a float8 tensor": (
        edited(lambda header: header["c"].update(dtype="F8_E4M3", shape=[24])), ["c: expected F32 or BF16", "F8_E4M3"],
    ),
    "no digests": (edited(lambda header: header["__metadata__"].pop("digests")), ['a JSON object as "digests"']),
    "digests no JSON": (set_digests("{"), ['a JSON object as "digests"']),
    "digests a list": (set_digests(json.dumps(sorted(some_tensors()))), ['a JSON object as "digests"']),
    "digests nested deeply": (set_digests("[" * 100_000), ['a JSON object as "digests"']),
    "a digest missing": (set_digests("{}"), ["a: a tensor without a digest"]),
    "a digest of another kind": (lambda path: change_digest(path, "a", [1]), ["a: digest [1] expected"]),
    "a hostile digest": (lambda path: change_digest(path, "a", "\x1b[2J\n"), ["a: digest \\x1b[2J\\n expected"]),
    "a hostile name": (
        lambda path: change_digest(path, "\x1b[2J\n../../etc/passwd", "0"), ["\\x1b[2J\\n../../etc/passwd: a digest"],
    ),
    "no provenance": (
        edited(lambda header: header["__metadata__"].pop("provenance")), ['a JSON object as "provenance"'],
    ),
    "provenance a string": (
        edited(lambda header: header["__metadata__"].update(provenance='"here"')), ['a JSON object as "provenance"'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_says_where(native: Path, kind: str) -> None:
    damage, needles = DAMAGE[kind]
    path = native / weights.WEIGHTS
    damage(path)
    refusal(lambda: load(native), path, *needles, "convert again")


@pytest.mark.parametrize("name", [weights.CONFIG, weights.PROCESSOR])
@pytest.mark.parametrize(
    ("content", "needle"),
    [(None, "o such file"), ("", "not JSON"), ("{", "not JSON"), ("[]", "object"), ('{"model_type": 1', "not JSON")],
)
def test_the_json_files(native: Path, name: str, content: str | None, needle: str) -> None:
    (native / name).unlink()
    if content is not None:
        (native / name).write_text(content)
    refusal(lambda: load(native), native / name, needle)


def test_specs_tell_shapes_and_dtypes(file: Path) -> None:
    found = weights.read_specs(file)
    assert list(found) == sorted(some_tensors())
    assert found["b/bias"] == ((7,), "bfloat16") and found["scalar"] == ((), "bfloat16")
    assert found["empty"] == ((0, 4), "float32") and found["c"] == ((2, 1, 3), "float32")
