"""Broken, mislabelled and hostile weight files: each is refused with one line that names the file or the tensor.

The letters are the rows of the fault catalogue these tests were written from.
"""

import argparse
import io
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weight_files import Strided, entry, read_all, refusal, safetensors_bytes, torch_pickle, write_zip

from beit_jax.convert.files.checkpoint import open_checkpoint
from beit_jax.errors import BeitJaxError

LEGACY = {"_use_new_zipfile_serialization": False}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def good_safetensors() -> bytes:
    header = {"a.weight": entry("F32", [2, 3], 0, 24), "b.bias": entry("F16", [4], 24, 32)}
    return safetensors_bytes(header, bytes(range(32)))


def saved(value: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


# A1: missing, a directory, unreadable, empty


def test_missing_file(tmp_path: Path) -> None:
    refusal(tmp_path / "model.safetensors", tmp_path / "model.safetensors", "no such file")


def test_link_to_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    (tmp_path / "pytorch_model.bin").write_bytes(saved({"w": torch.ones(1)}))
    refusal(tmp_path, "model.safetensors", "symbolic link")


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refusal(tmp_path, "model.safetensors", "is a directory")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    refusal(write(tmp_path / name, b""), name, "empty (0 bytes)")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.safetensors", good_safetensors())

    def deny(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)  # the tests may run as root, whom no mode stops
    refusal(path, path, "Permission denied")


def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refusal(tmp_path, "model.safetensors", "not a regular file")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300], ids=["NUL", "too long"])
def test_path_the_system_refuses(tmp_path: Path, name: str) -> None:
    refusal(tmp_path / name, "cannot read")


# A2, A3, A4: other things under the name of weights


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 345678\n",
            "345678 bytes (run: git lfs pull)",
        ),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML or XML page"),
        (b"\xef\xbb\xbf \n<HTML>", "an HTML or XML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an HTML or XML page"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"\x1f\x8b\x08\x00" + bytes(30), "gzip"),
    ],
    ids=["LFS", "HTML", "HTML with BOM", "XML", "JSON", "gzip"],
)
def test_not_weights_at_all(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    refusal(write(tmp_path / name, content), name, said, "expected")


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_pickle_named_safetensors(tmp_path: Path, options: dict[str, Any]) -> None:
    """Who asks for a .safetensors file relies on a format that is data only."""
    content = saved({"w": torch.ones(1)}, **options)
    refusal(write(tmp_path / "model.safetensors", content), "model.safetensors", "is a PyTorch pickle, not safetensors")


def test_safetensors_named_bin_is_read_and_said(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "pytorch_model.bin", good_safetensors())) as checkpoint:
        assert checkpoint.notes == ("pytorch_model.bin is a safetensors file",)


def test_unknown_content(tmp_path: Path) -> None:
    refusal(write(tmp_path / "weights.bin", b"\x13NOTHING" + bytes(50)), "weights.bin", "starts with", "NOTHING")


# A5, A6: too short, too long


@pytest.mark.parametrize("size", [1, 7, 8, 50, 100, -16, -1])
def test_truncated_safetensors(tmp_path: Path, size: int) -> None:
    whole = good_safetensors()
    path = write(tmp_path / "model.safetensors", whole[:size])
    message = refusal(path, path, "truncated", f" {len(whole[:size])}")
    if size < 0:
        assert f"promises {len(whole)} bytes" in message
        assert "b.bias" in message


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("size", [5, 100, 1000, -400, -1])
def test_truncated_torch_file(tmp_path: Path, options: dict[str, Any], size: int) -> None:
    whole = saved({"a.weight": torch.ones(200)}, **options)
    path = write(tmp_path / "x.pth", whole[:size])
    message = refusal(path, path)
    assert any(word in message for word in ("truncated", "damaged", "exhausted")), message


def test_bytes_behind_the_tensors(tmp_path: Path) -> None:
    whole = good_safetensors()
    refusal(write(tmp_path / "model.safetensors", whole + b"x"), "model.safetensors", "1 bytes behind", len(whole) + 1)
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("evil", "payload")
    refusal(write(tmp_path / "model.safetensors", whole + hidden.getvalue()), "bytes behind")


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_bytes_behind_a_torch_file(tmp_path: Path, options: dict[str, Any]) -> None:
    content = saved({"w": torch.ones(3)}, **options)
    refusal(write(tmp_path / "x.pth", content + b"12345"), "x.pth", "behind")


def test_bytes_before_a_torch_file(tmp_path: Path) -> None:
    """Python's zipfile reads an archive that starts later in a file; torch does not."""
    content = saved({"w": torch.ones(3)})
    refusal(write(tmp_path / "x.pth", b"#!/bin/sh\n" + content), "x.pth", "not a weight file")
    refusal(write(tmp_path / "x.pth", b"PK\3\4" + content), "x.pth", "in front of the archive")
    refusal(write(tmp_path / "x.pth", content + content), "x.pth", "in front of the archive")


# A7: offsets that do not fit


@pytest.mark.parametrize(
    ("entries", "tensor", "said"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "b", "overlaps tensor a"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, "b", "overlaps tensor a"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 12, 16)}, "b", "gap of 4 bytes behind tensor a"),
        ({"a": entry("F32", [1], 4, 8)}, "a", "gap of 4 bytes behind the start of the data"),
        ({"a": entry("F32", [4], 0, 16), "b": entry("F32", [0], 8, 8)}, "b", "overlaps tensor a"),
        ({"a": entry("F32", [5], 0, 20)}, "a", "truncated"),
        ({"a": entry("F32", [4], 0, 12)}, "a", "16 bytes, but its data_offsets [0, 12] hold 12"),
        ({"a": entry("F32", [4], 0, 20)}, "a", "16 bytes, but its data_offsets [0, 20] hold 20"),
        ({"a": entry("F32", [4], 16, 0)}, "a", "[16, 0]; expected [begin, end]"),
        ({"a": entry("F32", [4], -16, 0)}, "a", "[-16, 0]; expected [begin, end]"),
        ({"a": entry("F32", [1], 2**64 - 4, 2**64)}, "a", "expected [begin, end]"),
        ({"a": entry("F32", [2**62, 4], 0, 16)}, "a", "larger than any memory"),
        ({"a": entry("F32", [0, 2**62, 4], 0, 0)}, "a", "larger than any memory"),
        ({"a": entry("F32", [-4], 0, 16)}, "a", "[-4]; expected a list of non-negative integers"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "a", "[2.0]; expected a list of"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "a", "[True]; expected a list of"),
        ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "a", "expected a list of non-negative"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, "a", "expected [begin, end]"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": None}}, "a", "expected [begin, end]"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "a", "expected dtype, shape and data_offsets"),
        ({"a": [1, 2]}, "a", "expected dtype, shape and data_offsets"),
        ({"a": entry("F32", [4], 0, 16), "b": None}, "b", "expected dtype, shape and data_offsets"),
    ],
)  # fmt: skip
def test_offsets_shapes_and_bytes_disagree(tmp_path: Path, entries: dict[str, Any], tensor: str, said: str) -> None:
    path = write(tmp_path / "model.safetensors", safetensors_bytes(entries, bytes(16)))
    refusal(path, path, f"tensor {tensor}", said)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("[1]", "expected a JSON object"),
        (' {"a": 1}', "expected a JSON object"),
        ("\n{}", "expected a JSON object"),
        ("", "nothing but zeros"),
        ("{}", "no tensors"),
        ('{"__metadata__": {"format": "pt"}}', "no tensors"),
        ('{"__metadata__": 3}', "table of strings"),
        ('{"__metadata__": {"format": 3}, "a": 1}', "table of strings"),
        ('{"a": ', "not valid JSON"),
        ("{}\0", "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        ('{"a":' * 20000, "not valid JSON"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "\\ud800": 1}', "header entry 1"),
    ],
    ids=str,
)
def test_header_is_not_a_table_of_tensors(tmp_path: Path, header: str | bytes, said: str) -> None:
    path = write(tmp_path / "model.safetensors", safetensors_bytes(header, bytes(4)))
    refusal(path, path, said)


def test_the_library_has_the_last_word(tmp_path: Path) -> None:
    """A lone surrogate passes Python's JSON parser, not the safetensors library's."""
    header = '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    refusal(write(tmp_path / "model.safetensors", safetensors_bytes(header, bytes(4))), "safetensors refuses", tmp_path)


# A8: one name twice


@pytest.mark.parametrize("second", ["F32", "I32"], ids=["identical", "another dtype"])
def test_duplicate_name_in_safetensors(tmp_path: Path, second: str) -> None:
    one = '"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = "{" + one + ", " + one.replace("F32", second) + "}"
    refusal(
        write(tmp_path / "model.safetensors", safetensors_bytes(header, bytes(4))), "model.safetensors", "names w twice"
    )


def test_duplicate_field_of_a_tensor(tmp_path: Path) -> None:
    header = '{"w": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'
    refusal(write(tmp_path / "model.safetensors", safetensors_bytes(header, bytes(4))), "names dtype twice")


def test_duplicate_name_in_a_pickle(tmp_path: Path) -> None:
    pickled = torch_pickle({"wa": Strided((1,), (1,), 1), "wb": Strided((1,), (1,), 1, key="1")})
    path = write_zip(tmp_path / "x.pth", pickled.replace(b"wb", b"wa"), {"0": bytes(4), "1": bytes(4)})
    refusal(path, path, "'wa' twice")


def test_duplicate_record_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    pickled = torch_pickle({"w": Strided((1,), (1,), 1)})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile warns of what this test wants
        archive.writestr("archive/data.pkl", pickled)
        for value in (b"\0\0\0\0", b"\1\1\1\1"):
            archive.writestr("archive/data/0", value)
    refusal(path, path, "two records named archive/data/0")


# A9: too much


def test_header_over_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((8 * 2**20 + 1).to_bytes(8, "little") + b"{")
        file.truncate(100 * 2**20)
    refusal(path, path, "8388609", "at most 8388608")


def test_too_many_tensors(tmp_path: Path) -> None:
    names = {f"t{i}": entry("F32", [0], 0, 0) for i in range(20_001)}
    refusal(write(tmp_path / "model.safetensors", safetensors_bytes(names)), "20001 tensors", "at most 20000")


def test_rank_over_the_limit(tmp_path: Path) -> None:
    header = {"w": entry("F32", [1] * 9, 0, 4)}
    refusal(
        write(tmp_path / "model.safetensors", safetensors_bytes(header, bytes(4))),
        "tensor w",
        "9 dimensions",
        "at most 8",
    )
    refusal(write(tmp_path / "x.pth", saved({"w": torch.ones([1] * 9)})), "tensor w", "9 dimensions", "at most 8")


# A10, A24: kinds of tensors that are not converted


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "C64", "U16", "U32", "U64", "f32", "NAN64", None, 3])
def test_unsupported_dtype_in_safetensors(tmp_path: Path, dtype: object) -> None:
    header = {"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}
    path = write(tmp_path / "model.safetensors", safetensors_bytes(header, bytes(2)))
    refusal(path, path, "tensor w", f"dtype {dtype}", "expected one of F64, F32, F16, BF16")


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64), "ComplexFloat"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda: torch.ones(2).to(torch.uint16), "torch.uint16"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.ones(3, device="meta"), "meta"),
    ],
    ids=["complex", "float8", "uint16", "sparse", "sparse CSR", "quantised", "meta"],
)
def test_unsupported_tensor_in_a_torch_file(
    tmp_path: Path, make: Callable[[], torch.Tensor], said: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"good": torch.ones(1), "bad.one": make()}, **options))
    refusal(path, path, "tensor bad.one", said)


def test_unsupported_tensor_beside_the_weights_does_not_matter(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(1)}, "optimizer": {"state": {0: {"m": torch.eye(3).to_sparse()}}}}
    assert list(read_all(open_checkpoint(write(tmp_path / "x.pth", saved(state))))) == ["w"]


# A11, A12: see tests/convert/files/test_checkpoint.py; a BOOL is 0 or 1


def test_bool_that_is_neither_0_nor_1(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", safetensors_bytes({"w": entry("BOOL", [3], 0, 3)}, b"\0\1\7"))
    refusal(path, path, "tensor w", "BOOL", "byte 7", "expected 0 or 1")


# A14: a flipped bit


def test_flipped_bit_in_a_storage(tmp_path: Path) -> None:
    """torch.load returns the wrong number here; the archive's checksum tells."""
    state = {"first": torch.full((50,), 1.0), "second": torch.full((50,), 2.0), "view": torch.full((9, 9), 3.0)[1:, 2]}
    whole = saved(state)
    for name, value in (("first", 1.0), ("second", 2.0), ("view", 3.0)):
        at = whole.index(np.full(9, value, np.float32).tobytes())
        for bit in (0, 5 * 8 + 3, 35 * 8 + 7):
            broken = bytearray(whole)
            broken[at + bit // 8] ^= 1 << bit % 8
            path = write(tmp_path / "x.pth", bytes(broken))
            assert torch.load(path, weights_only=True).keys() == state.keys()
            refusal(path, path, "CRC mismatch in record archive/data/", f"tensor {name}", "expected", "found")


def test_flipped_bit_in_the_pickle(tmp_path: Path) -> None:
    broken = bytearray(saved({"some.name": torch.ones(2)}))
    broken[broken.index(b"some.name")] ^= 1
    path = write(tmp_path / "x.pth", bytes(broken))
    refusal(path, path, "CRC mismatch", "data.pkl")


# A16, A19: code


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


PAYLOADS: dict[str, tuple[Callable[[str], object], str]] = {
    "os.system": (lambda command: Call(os.system, command), "posix.system"),
    "eval": (lambda command: Call(eval, f"__import__('os').system({command!r})"), "builtins.eval"),
    "getattr": (
        lambda command: Call(getattr, Call(__import__, "os"), "system"),
        "builtins.getattr, builtins.__import__",
    ),
    "runpy": (lambda command: Call(runpy.run_path, command), "runpy.run_path"),
    "in a Namespace": (lambda command: argparse.Namespace(x=Call(os.system, command)), "posix.system"),
    "load_from_bytes": (lambda command: Call(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
}
WRAPPINGS: dict[str, Callable[[object, int], bytes]] = {
    "zip": lambda value, protocol: saved(value, pickle_protocol=protocol),
    "legacy": lambda value, protocol: saved(value, pickle_protocol=protocol, **LEGACY),
    "raw pickle": lambda value, protocol: pickle.dumps(value, protocol),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS.keys())
@pytest.mark.parametrize(("payload", "named"), PAYLOADS.values(), ids=PAYLOADS.keys())
@pytest.mark.parametrize("place", ["top", "args", "weights"])
def test_code_is_refused_and_does_not_run(
    tmp_path: Path, payload: Any, named: str, wrapping: Any, protocol: int, place: str
) -> None:
    sentinel = tmp_path / "sentinel"
    evil = payload(f"touch {sentinel}")
    weights = {"w": 1.0 if wrapping is WRAPPINGS["raw pickle"] else torch.ones(1)}
    value = {"top": evil, "args": {"model": weights, "args": evil}, "weights": {"model": weights | {"v": evil}}}[place]
    path = write(tmp_path / "x.pth", wrapping(value, protocol))
    refusal(path, path, "asks to run", named)
    assert not sentinel.exists()


def test_the_payload_of_these_tests_is_live(tmp_path: Path) -> None:
    """A sentinel that no loader would create proves nothing."""
    sentinel = tmp_path / "sentinel"
    make, _ = PAYLOADS["os.system"]
    pickle.loads(pickle.dumps(make(f"touch {sentinel}")))
    assert sentinel.exists()


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for pickled in (b"\x80\x02cevil_module\nThing\n.", b"\x80\x04\x8c\x0bevil_module\x8c\x05Thing\x93."):
        refusal(write_zip(tmp_path / "x.pth", pickled, {}), "asks to run", "evil_module.Thing")
    assert not (tmp_path / "sentinel").exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),  # protocol 0
        (b"(S'true'\nios\nsystem\n.", "uses opcode STRING"),
        (b"\x80\x02(U\x04trueios\nsystem\n.", "os.system"),  # INST calls without GLOBAL
        (b"\x80\x02(cos\nsystem\nU\x04trueo.", "os.system"),  # OBJ
        (b"\x80\x02\x82\x01.", "uses opcode EXT1"),  # a name from a registry
        (b"\x80\x02P1\n.", "uses opcode PERSID"),
    ],
)
def test_other_ways_to_call(tmp_path: Path, pickled: bytes, named: str) -> None:
    path = write_zip(tmp_path / "x.pth", pickled, {})
    refusal(path, path, named)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_whole_module(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "encoder.pkl", saved(torch.nn.Sequential(torch.nn.Linear(2, 2)), **options))
    refusal(
        path, path, "whole-module pickle", "torch.nn.modules.linear.Linear", "expected a state dict", "state_dict()"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(1), "holds a tensor"),
        ([torch.ones(1)], "holds a list"),
        (argparse.Namespace(model=1), "holds a argparse.Namespace"),
        ({}, "no state dict"),
        ({"epoch": 3, "lr": 0.1}, "found epoch, lr"),
        ({"model": {"w": torch.ones(1), "step": 3}}, "step in the state dict"),
        ({"model": {"w": torch.ones(1), 5: torch.ones(1)}}, "names a tensor 5"),
        ({3: torch.ones(1)}, "names a tensor 3"),
    ],
    ids=str,
)
def test_no_state_dict(tmp_path: Path, value: object, said: str) -> None:
    path = write(tmp_path / "x.pth", saved(value))
    refusal(path, path, said, "expected")


# A20: old formats; the legacy format itself is read, see tests/convert/files/test_checkpoint.py


def test_legacy_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({"protocol_version": 1000}, 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    refusal(path, path, "tar archive", "save it again")


def test_legacy_storage_of_another_size(tmp_path: Path) -> None:
    content = bytearray(saved({"w": torch.ones(3)}, **LEGACY))
    at = len(content) - 3 * 4 - 8
    assert content[at : at + 8] == (3).to_bytes(8, "little")
    content[at] = 2
    path = write(tmp_path / "x.pth", bytes(content))
    refusal(path, path, "2 elements", "says 3")


def test_legacy_of_a_big_endian_machine(tmp_path: Path) -> None:
    content = saved({"w": torch.ones(3)}, **LEGACY).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    path = write(tmp_path / "x.pth", content)
    refusal(path, path, "little-endian")


def test_zip_of_a_big_endian_machine(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", torch_pickle({"w": Strided((1,), (1,), 1)}))
        archive.writestr("archive/byteorder", "big")
        archive.writestr("archive/data/0", bytes(4))
    refusal(path, path, "byte order", "big", "expected little")


# A22, A23: bombs


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_record(tmp_path: Path, compression: int) -> None:
    pickled = torch_pickle({"w": Strided((2**20,), (1,), 2**20)})
    path = write_zip(tmp_path / "x.pth", pickled, {"0": bytes(2**22)}, compression)
    assert path.stat().st_size < 2**16
    refusal(path, path, "is compressed", "expected it stored as it is")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (Strided((100_000, 100_000), (0, 0), 4), "repeats elements"),
        (Strided((2, 2), (0, 1), 4), "repeats elements"),
        (Strided((3, 3), (1, 1), 4), "repeats elements"),
        (Strided((2, 2), (1, 1), 4), "repeats elements"),
        (Strided((2, 1, 2), (1, 9, 1), 4), "repeats elements"),
        (Strided((5,), (1,), 4), "storage of 4 elements"),
        (Strided((4,), (1,), 4, offset=1), "reaches element 5"),
        (Strided((2, 2), (3, 1), 4), "reaches element 5"),
        (Strided((2,), (2**62,), 4), "storage of 4 elements"),
        (Strided((2**62,), (1,), 4), "larger than any memory"),
        (Strided((2**61,), (1,), 4), "larger than any memory"),
        (Strided((0, 2**62), (1, 1), 4), "larger than any memory"),
        (Strided((-4,), (1,), 4), "[-4]; expected a list of non-negative"),
        (Strided((4,), (-1,), 4, offset=3), "offset 3 and strides [-1]"),
        (Strided((4,), (1,), 4, offset=-1), "offset -1"),
        (Strided((2, 2), (1,), 4), "strides [1] for shape [2, 2]"),
        (Strided((4.0,), (1,), 4), "malformed"),
        (Strided(((4,),), (1,), 4), "malformed"),
        (Strided((4,), (1,), 4, offset=True), "malformed"),
        (Strided((4,), (1,), 5), "record archive/data/0 has 16 bytes, the pickle says 20"),
        (Strided((2,), (1,), 3), "record archive/data/0 has 16 bytes, the pickle says 12"),
        (Strided((4,), (1,), 4, storage=torch.DoubleStorage), "has 16 bytes, the pickle says 32"),
        (Strided((4,), (1,), 4, key="7"), "record archive/data/7 is not in the archive"),
        (Strided((4,), (1,), 4, key="../../etc/passwd"), "is not in the archive"),
    ],
    ids=str,
)
def test_tensor_does_not_fit_its_storage(tmp_path: Path, tensor: Strided, said: str) -> None:
    path = write_zip(tmp_path / "x.pth", torch_pickle({"bad.tensor": tensor}), {"0": bytes(16)})
    refusal(path, path, "tensor bad.tensor", said)


def test_torch_itself_saves_and_loads_the_stride_bomb(tmp_path: Path) -> None:
    content = saved({"bad.tensor": torch.ones(1).expand(100_000, 100_000)})
    assert len(content) < 2000
    refusal(write(tmp_path / "x.pth", content), "tensor bad.tensor", "[100000, 100000]", "storage of 1 elements")


def test_storage_described_in_two_ways(tmp_path: Path) -> None:
    tensors = {"a": Strided((4,), (1,), 4), "b": Strided((4,), (1,), 4, storage=torch.IntStorage)}
    path = write_zip(tmp_path / "x.pth", torch_pickle(tensors), {"0": bytes(16)})
    refusal(path, path, "storage 0 in two ways")


_W = b"U\x01w" + torch_pickle(Strided((4,), (1,), 4))[2:-1]  # a sound tensor, beside which settings lie

BOMBS: dict[str, tuple[bytes, str]] = {
    "memo index": (b"\x80\x02]r\xff\xff\xff\x7f.", "holds a list"),
    "opcodes": (b"\x80\x02" + b"]" * 5_000_000 + b".", "more than 2000000 opcodes"),
    "text length": (b"\x80\x02X\xff\xff\xff\x7fab.", "expected 2147483647 bytes"),
    "text length in 8 bytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fab.", "expected 9223372036854775807 bytes"),
    "settings that double 64 times": (
        b"\x80\x02}(" + _W + b"U\x04args]q\x40" + b"".join(b"h%c\x86q%c" % (64 + i, 65 + i) for i in range(64)) + b"u.",
        "args (tuple) ignored",
    ),
    "settings that double 30 times": (  # not deep enough to be refused for depth
        b"\x80\x02}(" + _W + b"U\x04args]q\x40" + b"".join(b"h%c\x86q%c" % (64 + i, 65 + i) for i in range(30)) + b"u.",
        "args (tuple) ignored",
    ),
    "keys that hash slowly": (b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 64 + b"Ns.", "key of type tuple"),
    "keys that all collide": (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 50_000)) + b"u.",
        "key of type int",
    ),
    "repeated text": (
        b"\x80\x02c_codecs\nencode\nq\x00U\x06latin1q\x01X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x02]q\x03("
        + b"h\x00h\x02h\x01\x86R" * 10_000 + b"e.",
        "unpacks to more than 67108864 bytes",
    ),
    "repeated names": (
        b"\x80\x04X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x01]("
        + b"".join(b"h\x01U\x03%03d\x93" % i for i in range(1000)) + b"e.",
        "asks to run aaa",
    ),
    "deep": (b"\x80\x02" + b"](" * 400_000 + b"e" * 400_000 + b".", "holds a list"),
    "deep settings": (
        b"\x80\x02}(" + _W + b"U\x04args" + b"](" * 100_000 + b"e" * 100_000 + b"u.", "args (list) ignored"
    ),
}  # fmt: skip

LIMITED = """
import resource, sys, time
from pathlib import Path
from beit_jax.convert.files.checkpoint import open_checkpoint
from beit_jax.errors import BeitJaxError
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 600 * 2**20, -1))
start = time.monotonic()
try:
    with open_checkpoint(Path(sys.argv[1])) as checkpoint:
        print("read", {name: checkpoint.read(name).nbytes for name in checkpoint.tensors}, checkpoint.notes)
except BeitJaxError as error:
    print("refused", error)
assert time.monotonic() - start < 30
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory as Linux does")
@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bomb_in_600_mb(tmp_path: Path, name: str) -> None:
    """Refused, or harmless: settings that are too large are ignored and said so. Never memory, time or a crash."""
    pickled, said = BOMBS[name]
    path = write_zip(tmp_path / "x.pth", pickled, {"0": bytes(16)})
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("read {'w': 16}" if "settings" in name else "refused")
    assert said in done.stdout


def test_pickle_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.pth", bytes(64 * 2**20 + 1), {})
    refusal(path, path, "record archive/data.pkl", "67108865 bytes", "at most 67108864")


def test_zip_directory_over_the_limit_is_not_read(tmp_path: Path) -> None:
    """An archive whose end says that 17 MB of directory precede it."""
    size = 17 * 2**20
    end = b"PK\5\6" + bytes(4) + (1).to_bytes(2, "little") * 2 + size.to_bytes(4, "little") + bytes(6)
    path = write(tmp_path / "x.pth", b"PK\3\4" + bytes(size - 4) + end)
    refusal(path, path, "17825792 bytes", "at most 16777216")


# zip archives that are not what torch writes


def rewrite(path: Path, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)
    return path


def test_zip_without_a_pickle(tmp_path: Path) -> None:
    refusal(rewrite(tmp_path / "x.pth", archive__version=b"3"), "x.pth", "without data.pkl")


def test_torchscript(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "x.pth", a__data_pkl=b"\x80\x02}.", a__constants_pkl=b"\x80\x02).")
    refusal(path, "x.pth", "TorchScript")


def test_record_outside_the_folder(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "x.pth", a__data_pkl=b"\x80\x02}.", b__data_pkl=b"\x80\x02}.")
    refusal(path, "b/data.pkl", "outside a/")


def test_local_header_of_another_record(tmp_path: Path) -> None:
    """The archive's directory says data/0, the bytes there say data/1: two readers would disagree."""
    content = saved({"w": torch.ones(1)})
    assert content.count(b"archive/data/0") == 2
    path = write(tmp_path / "x.pth", content.replace(b"archive/data/0", b"archive/data/1", 1))
    refusal(path, path, "tensor w", "disagree")


def test_encrypted_record(tmp_path: Path) -> None:
    content = bytearray(saved({"w": torch.ones(1)}))
    content[content.index(b"PK\1\2") + 8] |= 1
    refusal(write(tmp_path / "x.pth", bytes(content)), "x.pth", "encrypted")


# A25: changed while reading


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "legacy.bin"])
@pytest.mark.parametrize("change", ["truncated", "emptied", "rewritten"])
def test_changed_while_reading(tmp_path: Path, name: str, change: str) -> None:
    """A mapped file would end the process with SIGBUS in the first two, and mix two files in the third."""
    path = tmp_path / name
    state = {"w": torch.ones(100_000), "view": torch.ones(1000)[5:]}
    if name == "model.safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        path.write_bytes(saved(state, **(LEGACY if name == "legacy.bin" else {})))
    with open_checkpoint(path) as checkpoint:
        checkpoint.read("w")
        checkpoint.read("view")
        if change == "rewritten":
            written = path.stat().st_mtime_ns
            path.write_bytes(path.read_bytes())
            os.utime(path, ns=(written + 1, written + 1))
        else:
            os.truncate(path, 2000 if change == "truncated" else 0)
        for tensor in state:
            with pytest.raises(BeitJaxError) as caught:
                checkpoint.read(tensor)
            message = str(caught.value)
            assert message.isprintable()
            assert all(part in message for part in (str(path), "changed while it was read", f"tensor {tensor}"))


def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.safetensors", good_safetensors())
    with open_checkpoint(path) as checkpoint:

        def fail(*args: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(BeitJaxError, match=r"tensor a\.weight from .*Input/output error"):
            checkpoint.read("a.weight")


# A33: names


HOSTILE = ["\x1b[31mred\n\x00", "../../etc/passwd", "", "n\u0430me", "x" * 100_000, "\u202eevil"]


@pytest.mark.parametrize("name", HOSTILE, ids=["escapes", "path", "empty", "look-alike", "long", "right to left"])
def test_hostile_names(tmp_path: Path, name: str) -> None:
    """They are read like any other, are printable in messages, and are never a path."""
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({name: torch.ones(2)}, inside / "model.safetensors")
    torch.save({name: torch.ones(2)}, inside / "x.pth")
    before = sorted(tmp_path.rglob("*"))
    for file in ("model.safetensors", "x.pth"):
        assert {key: array.tolist() for key, array in read_all(open_checkpoint(inside / file)).items()} == {
            name: [1, 1]
        }
    bad = safetensors_bytes({name: entry("F64", [1], 0, 4)}, bytes(4))
    refusal(write(inside / "model.safetensors", bad), "8 bytes, but its data_offsets")
    torch.save({name: torch.ones(2).to_sparse()}, inside / "x.pth")
    refusal(inside / "x.pth", "is sparse")
    assert sorted(tmp_path.rglob("*")) == before


def test_hostile_global_names(tmp_path: Path) -> None:
    pickled = b"\x80\x04\x8c\x03\x1b[2\x8c\x03a\nb\x93."
    refusal(write_zip(tmp_path / "x.pth", pickled, {}), "asks to run", "\\x1b[2.a\\nb")
    many = b"\x80\x02" + b"".join(b"cm%d\nf\n0" % i for i in range(30)).replace(b"\n0", b"\n") + b"."
    refusal(write_zip(tmp_path / "x.pth", many, {}), "m0.f", "and 22 more")


def test_hostile_file_name(tmp_path: Path) -> None:
    path = write(tmp_path / "\x1b[31m\n.bin", b"junk")
    refusal(path, "\\x1b[31m\\n.bin")
