"""Batches have the pixel values of `ImageProcessor`, whoever prepares them, and errors in the place of images."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_jax.bulk.decoding import Preparing, batches, default_workers
from beit_jax.bulk.images import FileImage, HeldImage, NoImage
from beit_jax.bulk.pictures import quickly
from beit_jax.errors import BeitJaxError
from beit_jax.images import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor

RNG = np.random.default_rng(0)
PROCESSORS = {
    "squash": ImageProcessor(),
    "crop": ImageProcessor(resize=110, crop=(96, 100), resample="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "pad, own factor": ImageProcessor(resize=None, crop=(120, 90), rescale_factor=0.0123, mean=None, std=None),
    "lanczos": ImageProcessor(resize=(20, 30), resample="lanczos"),
    "sampled": ImageProcessor(resize=(20, 30), antialias=False),
}


def file(mode: str, format: str, size: tuple[int, int] = (131, 97), **options: object) -> bytes:
    values = RNG.integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(values, "RGBA").convert("RGB").resize(size)
    if mode == "I;16":
        image = Image.fromarray((values[..., 0].astype(np.uint16) << 8) + values[..., 1])
    elif mode == "RGBA":
        image = Image.fromarray(values, "RGBA")
    elif mode != "RGB":
        image = image.convert(mode)
    written = io.BytesIO()
    image.save(written, format, **options)
    return written.getvalue()


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


FILES = {
    "jpeg": file("RGB", "JPEG", quality=90),
    "progressive": file("RGB", "JPEG", progressive=True, quality=80),
    "not turned": file("RGB", "JPEG", exif=exif(1)),
    "turned": file("RGB", "JPEG", exif=exif(6)),
    "turned by XMP": file("RGB", "JPEG", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"> tiff:Orientation="8"</x:xmpmeta>'),
    "grey": file("L", "JPEG"),
    "CMYK": file("CMYK", "JPEG"),
    "alpha": file("RGBA", "PNG"),
    "16 bits": file("I;16", "PNG"),
    "palette": file("P", "GIF"),
    "tiny": file("RGB", "JPEG", (1, 2)),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_are_the_processors(processor: ImageProcessor, tmp_path: Path) -> None:
    for name, data in FILES.items():
        path = tmp_path / name
        path.write_bytes(data)
        expected = processor.one(path, name)
        for quick in (False, True):
            found = Preparing(processor, quick).one(FileImage(str(path)))
            assert isinstance(found, np.ndarray) and np.array_equal(found, expected), (name, quick)


def test_only_what_is_sure_is_done_quickly() -> None:
    pytest.importorskip("simplejpeg")
    done = {name for name, data in FILES.items() if quickly(data, PROCESSORS["squash"], name) is not None}
    assert done == {"jpeg", "progressive", "not turned", "tiny"}
    assert quickly(FILES["jpeg"][:-300], PROCESSORS["squash"], "x") is None
    for other in (PROCESSORS["lanczos"], PROCESSORS["sampled"], replace(PROCESSORS["squash"], bands=(1, 2, 3))):
        assert quickly(FILES["jpeg"], other, "x") is None


def test_bands(tmp_path: Path) -> None:
    path = tmp_path / "bands.npy"
    np.save(path, RNG.integers(0, 65535, (20, 30, 6)).astype(np.uint16))
    processor = ImageProcessor(resize=(8, 8), num_channels=4, bands=(6, 2, 1, 3), mean=None, std=None)
    found = Preparing(processor).one(FileImage(str(path)))
    assert isinstance(found, np.ndarray) and np.array_equal(found, processor.one(path, "x")) and found.shape[2] == 4


IMAGES = [
    HeldImage("a", FILES["jpeg"]), NoImage("b", "a link"), HeldImage("c", FILES["alpha"]), HeldImage("d", b""),
    HeldImage("e", FILES["grey"]),
]  # fmt: skip


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_are_in_order_with_errors_in_their_places(workers: int, size: int) -> None:
    processor = replace(PROCESSORS["squash"], resize=(16, 12))
    groups = [IMAGES[start : start + size] for start in range(0, len(IMAGES), size)] * 3
    names: list[str] = []
    for group, batch in zip(groups, batches(processor, groups, size=size, workers=workers), strict=True):
        assert batch.pixels.shape == (size, 16, 12, 3) and len(batch) == len(group)
        assert not batch.pixels[len(group) :].any()
        for image, row, error in zip(group, batch.pixels, batch.errors, strict=False):
            if image.name in "bd":
                assert error is not None and error.startswith(f"{image.name}: ") and not row.any()
            else:
                assert error is None and np.array_equal(row, Preparing(processor).one(image))
        names += batch.names
    assert names == [image.name for image in IMAGES] * 3


def test_images_of_a_batch_have_one_size() -> None:
    processor = ImageProcessor(resize=20)

    def of(names: Sequence[str]) -> list[list[HeldImage]]:
        return [[HeldImage(name, FILES[name]) for name in names]]

    (batch,) = batches(processor, of(["jpeg", "grey"]), size=3, workers=0)
    assert batch.pixels.shape == (3, 20, 27, 3)
    with pytest.raises(BeitJaxError, match="expected all of one size, found 20x27, 40x20; resize or crop them"):
        list(batches(processor, of(["jpeg", "tiny"]), size=3, workers=0))


def test_few_images_start_no_process() -> None:
    assert default_workers(64) == 0 and 0 <= default_workers(10**6) <= 16
