"""The checks that the containers of images carry, where the decoders leave them out. They read every byte once.

| format | what it can notice by itself | who looks |
|---|---|---|
| PNG | CRC-32 of every chunk, which covers the compressed pixels and zlib's own checksum; end chunk | here |
| TIFF, deflated | zlib's Adler-32 of the pixels | here: libtiff looks at it only where it reads to the end |
| TIFF, other | words that no fax code has, LZMA's checksum; LZW, Zstandard, JPEG and plain pixels have none | libtiff |
| GIF | lengths of blocks, and what follows the first frame; no checksum | here |
| JPEG 2000 | lengths of boxes, end marker; no checksum | here |
| JPEG | markers, end marker; no checksum | libjpeg |
| WebP, AVIF | lengths of chunks and boxes; no checksum | libwebp, libavif |
| BMP, PPM | whether enough bytes are there; no checksum | Pillow |

So a changed byte in a PNG or in a deflated TIFF is always noticed. Elsewhere a file that was cut off is noticed, and a
changed byte only where it breaks the structure. Only of an animation is what follows the first frame not looked at.

zlib's checksum inside a PNG is not computed as well: the CRC-32 covers it, and inflating a second time would nearly
double the time of decoding. In a deflated TIFF nothing else covers the pixels.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Final

from PIL import Image, TiffImagePlugin

_PNG_HEAD: Final = 8  # bytes of the signature, which Pillow has compared
_GIF_HEAD: Final = 13
_GIF_EXTENSION, _GIF_FRAME, _GIF_TRAILER = 0x21, 0x2C, 0x3B
_JPEG2000_END: Final = b"\xff\xd9"
_TIFF_COMPRESSION: Final = 259
_TIFF_DEFLATED: Final = (8, 32946)
_TIFF_PIECES: Final = ((273, 279), (324, 325))  # offsets and lengths: of strips, of tiles
_PIECE: Final = 1 << 20  # bytes inflated at once
_MOST_INFLATED: Final = 1 << 30  # bytes: the largest image has fewer


class DamageError(ValueError):
    """A container's own check failed; the message says which, in a few words."""


def check_container(data: bytes, image: Image.Image) -> None:
    """Compares the bytes of an image file with the checks that its format has and its decoder leaves out.

    Args:
        image: the file as Pillow opened it, which need not have decoded the pixels.

    Raises:
        DamageError: a checksum is wrong, or the file is cut off.
    """
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(data, image)
        elif check := _CHECKS.get(image.format or ""):
            check(data)
    except IndexError:
        raise DamageError("cut off") from None


def _check_png(data: bytes) -> None:
    view, place = memoryview(data), _PNG_HEAD
    while True:
        kind = data[place + 4 : place + 8]
        end = place + 8 + int.from_bytes(view[place : place + 4], "big")
        if len(data) < end + 4 or len(kind) < 4:
            raise DamageError("cut off before its end chunk")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise DamageError(f"wrong checksum of the chunk at byte {place}")
        if kind == b"IEND":
            return
        place = end + 4


def _check_gif(data: bytes) -> None:
    place = _GIF_HEAD + _gif_colours(data[10])
    while data[place] == _GIF_EXTENSION:
        place = _after_gif_blocks(data, place + 2)
    if data[place] != _GIF_FRAME:
        raise DamageError(f"no frame at byte {place}")
    place = _after_gif_blocks(data, place + 11 + _gif_colours(data[place + 9]))
    if data[place] not in (_GIF_EXTENSION, _GIF_FRAME, _GIF_TRAILER):
        raise DamageError(f"neither a block nor the end at byte {place}")


def _gif_colours(flags: int) -> int:
    """The bytes of the colour table that these flags announce."""
    return 3 * 2 ** (1 + flags % 8) if flags & 0x80 else 0


def _after_gif_blocks(data: bytes, place: int) -> int:
    """The place after a sequence of blocks, each of which begins with its length; length 0 ends it."""
    while data[place]:
        place += 1 + data[place]
    return place + 1


def _check_jpeg2000(data: bytes) -> None:
    if data.startswith(b"\xff\x4f"):  # a bare code stream
        last = len(data)
    else:
        last = place = 0
        while place < len(data):
            length, kind, head = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], 8
            if length == 1:
                length, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
            end = place + length if length else len(data)
            if end > len(data) or end < place + head:
                raise DamageError(f"cut off in the box at byte {place}")
            last, place = (end if kind == b"jp2c" else last), end
    if data[max(last - 2, 0) : last] != _JPEG2000_END:
        raise DamageError("no end marker")


def _check_tiff(data: bytes, image: TiffImagePlugin.TiffImageFile) -> None:
    tags = image.tag_v2
    if tags.get(_TIFF_COMPRESSION) not in _TIFF_DEFLATED:
        return
    left = _MOST_INFLATED
    for offsets, lengths in _TIFF_PIECES:
        for place, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=True):
            left = _check_deflated(data[place : place + length], place, left)


def _check_deflated(data: bytes, place: int, left: int) -> int:
    """Inflates a zlib stream to its checksum; of `left` bytes that may come out, it returns the rest."""
    stream = zlib.decompressobj()
    while not stream.eof:
        try:
            found = len(stream.decompress(data, _PIECE))
        except zlib.error:
            raise DamageError(f"the deflated pixels at byte {place} are damaged") from None
        data, left = stream.unconsumed_tail, left - found
        if left < 0 or (not found and not data and not stream.eof):
            raise DamageError(f"the deflated pixels at byte {place} do not end")
    return left


_CHECKS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "PNG": _check_png,
    "GIF": _check_gif,
    "JPEG2000": _check_jpeg2000,
}
