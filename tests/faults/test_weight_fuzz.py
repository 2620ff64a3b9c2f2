"""Random damage to small weight files: an error of one kind or the right values, never another exception.

`BEIT_JAX_FUZZ_EXAMPLES=100000 pytest tests/faults/test_weight_fuzz.py` runs longer.
"""

import collections
import io
import json
import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weight_files import entry, read_all, safetensors_bytes, write_zip

from beit_jax.convert.files.checkpoint import open_checkpoint
from beit_jax.errors import BeitJaxError

fuzz = settings(
    max_examples=int(os.environ.get("BEIT_JAX_FUZZ_EXAMPLES", 400)),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.int16),
    "c": torch.ones(2, 2).t(),
}
VALUES = {name: tensor.tolist() for name, tensor in STATE.items()}


def torch_bytes(**options: Any) -> bytes:
    stream = io.BytesIO()
    training = {"lr": [0.1, 1e-5], "name": "x", "ids": {1, 2}, "raw": b"12"}
    torch.save({"model": collections.OrderedDict(STATE), "epoch": 7, "args": training}, stream, **options)
    return stream.getvalue()


ZIP = torch_bytes()
LEGACY = torch_bytes(_use_new_zipfile_serialization=False)
PICKLES = {}
for protocol in (2, 4, 5):
    with zipfile.ZipFile(io.BytesIO(torch_bytes(pickle_protocol=protocol))) as archive:
        PICKLES[protocol] = archive.read("archive/data.pkl")
        RECORDS = {name[13:]: archive.read(name) for name in archive.namelist() if name.startswith("archive/data/")}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry("F32", [2, 3], 0, 24),
    "b": entry("I16", [4], 24, 32),
    "c": entry("F32", [2, 2], 32, 48),
}
SAFETENSORS = safetensors_bytes(
    HEADER, b"".join(STATE[name].contiguous().numpy().tobytes() for name in ("a.weight", "b", "c"))
)
INDEX = {"metadata": {"total_size": 48}, "weight_map": {name: f"{name[0]}.safetensors" for name in STATE}}


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """Bits flipped, bytes set, cut out, doubled or put in, at up to four places; or cut short."""
    place = st.integers(0, len(good) - 1)
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("double"), place, st.integers(1, 64)),
        st.tuples(st.just("drop"), place, st.integers(1, 64)),
        st.tuples(st.just("cut"), place, st.none()),
    )
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: apply(good, changes))


def apply(good: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    content = bytearray(good)
    for kind, at, what in changes:
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << what
        elif kind == "set":
            content[at : at + len(what)] = what
        elif kind == "insert":
            content[at:at] = what
        elif kind == "double":
            content[at:at] = content[at : at + what]
        elif kind == "drop":
            del content[at : at + what]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


def values(path: Path) -> dict[str, Any] | None:
    """What the file holds, or None if it is refused as it should be. Every other exception passes."""
    try:
        arrays = read_all(open_checkpoint(path))
    except BeitJaxError as error:
        assert str(error).isprintable()
        return None
    return {name: array.tolist() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_undamaged(folder: Path) -> None:
    """What is fuzzed below is readable to begin with."""
    for name, content in (("x.safetensors", SAFETENSORS), ("x.bin", ZIP), ("x.pth", LEGACY)):
        (folder / name).write_bytes(content)
        assert values(folder / name) == VALUES
    for pickled in PICKLES.values():
        assert values(write_zip(folder / "y.bin", pickled, RECORDS)) == VALUES


@fuzz
@given(damaged(SAFETENSORS))
def test_safetensors(folder: Path, content: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    values(path)


@fuzz
@given(damaged(SAFETENSORS[8:-48]))
def test_safetensors_header(folder: Path, header: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, SAFETENSORS[-48:]))
    values(path)


@fuzz
@given(damaged(ZIP))
def test_zip_is_refused_or_right(folder: Path, content: bytes) -> None:
    """Every byte that matters is under a checksum or compared with another: damage never gives other values."""
    path = folder / "model.bin"
    path.write_bytes(content)
    assert values(path) in (None, VALUES)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_zip_is_refused_or_harmless(folder: Path, bit: int) -> None:
    path = folder / "model.bin"
    start = ZIP.index(STATE["a.weight"].numpy().tobytes())
    for at in range(0, len(ZIP), 3):
        path.write_bytes(apply(ZIP, [("flip", at, bit)]))
        found = values(path)
        assert found in (None, VALUES), f"bit {bit} of byte {at}"
        assert found is None or not start <= at < start + 24


@fuzz
@given(damaged(LEGACY))
def test_legacy(folder: Path, content: bytes) -> None:
    path = folder / "legacy.bin"
    path.write_bytes(content)
    values(path)


@fuzz
@given(st.sampled_from(sorted(PICKLES)).flatmap(lambda protocol: damaged(PICKLES[protocol])))
def test_pickle_behind_a_right_checksum(folder: Path, pickled: bytes) -> None:
    values(write_zip(folder / "pickle.bin", pickled, RECORDS))


_CODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
_NAMES = [
    b"cposix\nsystem\n",
    b"ccollections\nOrderedDict\n",
    b"cnumpy\ndtype\n",
    b"cdatetime\ndatetime\n",
    b"ctorch\nSize\n",
]
_ATOMS = st.one_of(
    st.sampled_from(_CODES + _NAMES), st.binary(max_size=4), st.sampled_from([b"U\x01a", b"K\x01", b"h\x00"])
)


@fuzz
@given(st.lists(_ATOMS, max_size=40))
def test_any_opcodes_in_any_order(folder: Path, opcodes: list[bytes]) -> None:
    values(write_zip(folder / "opcodes.bin", b"\x80\x04" + b"".join(opcodes) + b".", RECORDS))


@fuzz
@given(damaged(json.dumps(INDEX).encode()))
def test_index(folder: Path, index: bytes) -> None:
    directory = folder / "sharded"
    directory.mkdir(exist_ok=True)
    for name, tensor in STATE.items():
        raw = tensor.contiguous().numpy().tobytes()
        header = {name: entry("I16" if name == "b" else "F32", list(tensor.shape), 0, len(raw))}
        (directory / f"{name[0]}.safetensors").write_bytes(safetensors_bytes(header, raw))
    (directory / "model.safetensors.index.json").write_bytes(index)
    found = values(directory) or {}  # a whole shard can go unmentioned; that tensors are missing shows later
    assert found.items() <= VALUES.items()
