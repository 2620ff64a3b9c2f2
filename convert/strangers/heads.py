"""First bytes of files that are no weights."""

import re

from beit_jax.errors import printable

from .kind import AGAIN, ORIGINAL, PADDLE_PROGRAM, UNPACK, Stranger

# First bytes at an offset. The first that fits counts.
_HEADS: tuple[tuple[int, bytes, Stranger], ...] = (
    (0, b"GGUF", Stranger("GGUF, of ggml (llama.cpp, stable-diffusion.cpp), mostly quantised", ORIGINAL)),
    (4, b"TFL3", Stranger("TFLite, a program of TensorFlow Lite", ORIGINAL)),
    (
        0,
        b"\x93NUMPY",
        Stranger("one array of NumPy", "save all tensors by name, by safetensors"),
    ),
    (
        257,
        b"ustar",
        Stranger("a tar archive, which PyTorch before 0.2 wrote", "load it there and save it again, or unpack it"),
    ),
    (0, b"\x1f\x8b", Stranger("gzip-compressed", "gunzip it, and give what is in it")),
    (0, b"\xfd7zXZ\0", Stranger("compressed by xz", UNPACK)),
    (0, b"BZh", Stranger("compressed by bzip2", UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Stranger("compressed by zstd", UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Stranger("a 7-Zip archive", UNPACK)),
    (0, b"Rar!", Stranger("a RAR archive", UNPACK)),
    (0, b"PAR1", Stranger("a Parquet table of data", "give the weights beside it")),
    (0, b"%PDF", Stranger("a PDF document", AGAIN)),
    (0, b"\x89PNG", Stranger("a PNG image", "give the model's weights")),
    (0, b"\xff\xd8\xff", Stranger("a JPEG image", "give the model's weights")),
    (0, b"\x7fELF", Stranger("a program", "give the model's weights")),
)


def of_bytes(head: bytes, suffix: str) -> Stranger | None:
    """Returns what a file is whose first 512 bytes are `head`; None if no mark tells it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        size = text.partition(b"\nsize ")[2].split(b"\n")[0]
        found = f"a Git LFS pointer to a file of {printable(size.decode('latin-1'))} bytes (run: git lfs pull)"
        return Stranger(found, "the weights themselves are not here yet")
    if head and not head.strip(b"\0"):
        return Stranger("nothing but zeros at its start, as a download that was not finished", AGAIN)
    if text.startswith((b"# xet version", b"outs:", b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return Stranger(
            "a pointer of Git Xet, DVC or git-annex", "fetch the weights themselves (git xet, dvc pull, git annex get)"
        )
    if text.startswith(b"<?xml") and b"<net " in text:
        return Stranger("OpenVINO, a program", ORIGINAL)
    if text.startswith(b"<"):
        return Stranger("an HTML or XML page, probably an error message saved as weights", AGAIN)
    if text.startswith(b"{") and re.search(rb'"magic"\s*:\s*"pir"', text[:100]):
        return PADDLE_PROGRAM
    if text.startswith((b"{", b"[")) and b"\0" not in head:
        return Stranger("JSON text, probably an error message saved as weights", AGAIN)
    for offset, mark, stranger in _HEADS:
        if head[offset : offset + len(mark)] == mark:
            return stranger
    if re.match(rb"\0{16}[\x04-\x40]\0{3}\x08[\0-\x20]", head):  # a version, no levels of detail, a version, a type
        return PADDLE_PROGRAM
    return _protobuf(head, suffix)


def _protobuf(head: bytes, suffix: str) -> Stranger | None:
    """ONNX begins with a version and its producer's name, mindspore with a named tensor of a type."""
    if re.match(rb"\x08[\x01-\x20]\x12[\x01-\x40][ -~]", head):
        producer = head[4 : 4 + head[3]].decode("latin-1")
        return Stranger(f"ONNX, a program written by {printable(producer, 60)}", ORIGINAL)
    if suffix == ".onnx":
        return Stranger("ONNX, a program", ORIGINAL)
    if head[:1] == b"\x0a" and re.search(rb"\x12.{1,40}\x12[\x04-\x0a](B?Float|Int|UInt)\d+", head, re.DOTALL):
        way = 'mindspore.save_checkpoint(mindspore.load_checkpoint(FILE), "NEW", format="safetensors")'
        return Stranger("a checkpoint of mindspore", f"save it there by {way}")
    return None
