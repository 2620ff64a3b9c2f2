"""Images as they break: changed bytes, cut files, reads that fail, one bad picture in a folder; one image or several.

The tables name the formats and the places where images are read. A changed byte in a PNG once moved features as far as
another picture would, without a word.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.images.files import FORMATS, open_image
from beit_jax.images.label_maps import decode_label_map, read_label_map
from beit_jax.images.listing import SUFFIXES, image_files
from beit_jax.inference.segmentation import MAX_SIDE, segment
from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
from beit_jax.train.augmentation.decode import decode
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.data.listing import annotated_images, class_images
from tests.support.segmenter import save_segmenter

DIGITS = Path(str(files("beit_jax") / "digits"))
PICTURES = sorted((DIGITS / "images").iterdir())[:6]
SIZE = (10, 16)  # rows of a BMP without padding


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture().quantize(64) if form == "GIF" else picture()).save(buffer, form, **options)
    return buffer.getvalue()


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must fail with exit code 2 and print nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits classifier, converted."""
    directory = tmp_path_factory.mktemp("classifier") / "native"
    assert main(["convert", str(DIGITS), str(directory)]) == 0
    return directory


# --- The checks of containers

CHECKED: dict[str, bytes] = {
    "png": encoded("PNG"),
    "tiff, deflated": encoded("TIFF", compression="tiff_adobe_deflate"),
}
CONTAINERS: dict[str, bytes] = {
    "jpeg": encoded("JPEG"),
    "progressive jpeg": encoded("JPEG", progressive=True),
    "webp": encoded("WEBP"),
    "lossless webp": encoded("WEBP", lossless=True),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "ppm": encoded("PPM"),
    "tiff": encoded("TIFF"),
    "jpeg 2000": encoded("JPEG2000"),
    "bare jpeg 2000": encoded("JPEG2000", no_jp2=True),
    "avif": encoded("AVIF"),
    **CHECKED,
}
READERS: dict[str, Callable[[bytes, Path], np.ndarray]] = {
    "open_image": lambda data, path: (path.write_bytes(data), np.asarray(open_image(path)))[1],
    "decode": lambda data, path: decode(data, "x"),
}


def refused_or(expected: np.ndarray, read: Callable[[], np.ndarray], what: str) -> bool:
    """True if the bytes are refused in one line; otherwise they must give the expected pixels."""
    try:
        found = read()
    except BeitJaxError as error:
        assert str(error).isprintable() and " at 0x" not in str(error)
        return True
    assert np.array_equal(found, expected), what
    return False


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_byte_of_a_png_is_always_noticed(reader: str, tmp_path: Path) -> None:
    data, read = CHECKED["png"], READERS[reader]
    expected = read(data, tmp_path / "x")
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :]
        assert refused_or(expected, lambda changed=changed: read(changed, tmp_path / "x"), f"byte {place}"), place


@pytest.mark.parametrize("options", [{}, {"tiffinfo": {317: 2}}], ids=["plain", "differences of neighbours"])
def test_a_changed_byte_of_deflated_pixels_of_a_tiff_is_always_noticed(options: dict[str, Any]) -> None:
    """Also where the damage gives enough pixels before the end: there libtiff does not read on to the checksum."""
    buffer = io.BytesIO()
    smooth = picture().resize((30, 24))
    smooth.save(buffer, "TIFF", compression="tiff_adobe_deflate", **options)
    data = buffer.getvalue()
    with Image.open(buffer) as image:
        start, length = image.tag_v2[273][0], image.tag_v2[279][0]  # type: ignore[attr-defined]
    expected, refused = decode(data, "x"), 0
    assert np.array_equal(expected, smooth)
    for place in range(start, start + length):
        changed = data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :]
        refused += refused_or(expected, lambda changed=changed: decode(changed, "x"), f"byte {place}")
    assert refused >= length - 1, "deflate has bits that mean nothing"


def test_a_damaged_header_of_a_tiff_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow logs what it finds there, and warns of EXIF data; both would be lines of their own."""
    data = CHECKED["tiff, deflated"]
    expected = decode(data, "x")
    for place in [*range(8), *range(len(data) - 160, len(data))]:
        changed = data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :]
        with contextlib.suppress(BeitJaxError):
            assert decode(changed, "x").dtype == expected.dtype
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("compression", "mode"), [("tiff_adobe_deflate", "RGB"), ("group4", "1")])
def test_what_libtiff_notices_is_one_line(compression: str, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff would print a line of its own, and go on after the damage of a fax page."""
    buffer = io.BytesIO()
    picture().convert(mode).save(buffer, "TIFF", compression=compression)
    whole = buffer.getvalue()
    with Image.open(buffer) as image:
        start, length = image.tag_v2[273][0], image.tag_v2[279][0]  # type: ignore[attr-defined]
    place = start + length // 2
    damaged = whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :]
    with pytest.raises(BeitJaxError, match="damaged"):
        decode(damaged, "x")
    assert capfd.readouterr() == ("", "")
    assert decode(whole, "x").shape == (*SIZE, 3)
    with pytest.raises(OSError, match="decoder error") if mode == "RGB" else contextlib.nullcontext():
        Image.open(io.BytesIO(damaged)).load()
    assert "Decode" in capfd.readouterr().err, "a program's own pictures print what they did"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", CONTAINERS)
def test_a_file_that_was_cut_off_is_noticed(form: str, reader: str, tmp_path: Path) -> None:
    data, read = CONTAINERS[form], READERS[reader]
    cuts = {1, 2, 3, 12, *range(len(data) // 2, len(data), max(1, len(data) // 25))}
    for length in sorted({len(data) - cut for cut in cuts if cut < len(data)} | {len(data) // 3}):
        with pytest.raises(BeitJaxError):
            read(data[:length], tmp_path / "x")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_what_follows_the_end_and_unknown_chunks_change_nothing() -> None:
    data = CHECKED["png"]
    expected = decode(data, "x")
    assert np.array_equal(decode(data + b"appended", "x"), expected)
    end = data.rindex(b"IEND") - 4
    assert np.array_equal(decode(data[:end] + chunk(b"teST", b"unknown") + data[end:], "x"), expected)


def test_label_maps_are_checked_too(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 9, SIZE, dtype=np.uint8)).save(buffer, "PNG")
    data = buffer.getvalue()
    expected = decode_label_map(data, "x")
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :]
        assert refused_or(expected, lambda changed=changed: decode_label_map(changed, "x"), f"byte {place}"), place


def damaged_png() -> bytes:
    """The pixels' chunk is changed, its checksum is not."""
    data = bytearray(PICTURES[0].read_bytes())
    data[data.index(b"IDAT") + 12] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", "NATIVE", "FOLDER/nine/bad.png"],
        ["features", "NATIVE", "FOLDER/nine/bad.png", "-o", "NEW/f.npz"],
        ["plot", "attention", "NATIVE", "FOLDER/nine/bad.png", "-o", "NEW/a.png"],
        ["evaluate", "NATIVE", "--data", "FOLDER", "--workers", "0"],
        ["prepare", "folder", "FOLDER", "NEW/data", "--held-out", "0"],
    ],
)
def test_every_command_names_the_damaged_picture(
    arguments: list[str], native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder" / "nine").mkdir(parents=True), (tmp_path / "new").mkdir()
    (tmp_path / "folder" / "nine" / "bad.png").write_bytes(damaged_png())
    places = {"NATIVE": native, "FOLDER": tmp_path / "folder", "NEW": tmp_path / "new"}
    words = []
    for word in arguments:
        first, slash, rest = word.partition("/")
        words.append(f"{places[first]}{slash}{rest}" if first in places else word)
    message = error(capsys, *words)
    assert "bad.png" in message and "checksum" in message
    assert not list((tmp_path / "new").iterdir())


# --- Reading that fails, and pictures of strange sizes


def failing(self: Path) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_read_that_fails_is_one_line(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "nine").mkdir()
    (tmp_path / "nine" / "p.png").write_bytes(PICTURES[0].read_bytes())
    monkeypatch.setattr(Path, "read_bytes", failing)
    for call in (open_image, read_label_map):
        with pytest.raises(BeitJaxError, match=r"p\.png: cannot be read \(Input/output error\)"):
            call(tmp_path / "nine" / "p.png")
    monkeypatch.undo()
    if Path("/proc/self/mem").exists():  # can be opened, and not be read
        assert "cannot be read" in error(capsys, "classify", native, "/proc/self/mem")
        (tmp_path / "nine" / "q.png").symlink_to("/proc/self/mem")
        assert "cannot be read" in error(capsys, "evaluate", native, "--data", tmp_path, "--workers", "0")


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "endless.png"):
        with pytest.raises(BeitJaxError, match="no regular file"):
            open_image(tmp_path / name)


def test_a_picture_too_wide_to_segment_is_refused_at_once(segmenter: Any) -> None:
    wide = np.zeros((1, MAX_SIDE + 1), np.uint8)
    with pytest.raises(BeitJaxError, match=f"{MAX_SIDE + 1}x1 pixels, expected sides of at most {MAX_SIDE}"):
        segment(*segmenter, wide)


def test_a_backend_that_does_not_exist_is_one_line(native: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "beit_jax", "features", native, PICTURES[0], "-o", tmp_path / "f.npz"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "nonsense"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "JAX_PLATFORMS=nonsense" in done.stderr
    assert not list(tmp_path.iterdir())


# --- One image or several


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return beit_jax.from_pretrained(save_segmenter(tmp_path_factory.mktemp("segmenter") / "m", ("a", "b", "c")))


@pytest.fixture(scope="module")
def digits() -> Any:
    return beit_jax.from_pretrained(DIGITS)


def kinds(path: Path) -> dict[str, Any]:
    """One image as every kind that is accepted."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    grey = np.asarray(rgb.convert("L"))
    colour = np.asarray(rgb)
    arrays = {"array h w 3": colour, "h w": grey, "h w 1": grey[..., None], "jax": jnp.asarray(colour)}
    return {"path": path, "text": str(path), "PIL": rgb, **arrays}


KINDS = list(kinds(PICTURES[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_gives_one_result_and_a_batch_a_list(kind: str, digits: Any, segmenter: Any) -> None:
    image, other = kinds(PICTURES[0])[kind], kinds(PICTURES[1])[kind]
    one, two = beit_jax.classify(*digits, [image, other], batch_size=1)
    single = beit_jax.classify(*digits, image)
    assert single == one != two and len(single) == 5
    assert beit_jax.classify(*digits, [image]) == [single]
    for pooling, shape in (("pooled", (64,)), ("tokens", (65, 64))):
        row, rows = (
            beit_jax.features(*digits, given, pooling=pooling, batch_size=1) for given in (image, [image, other])
        )
        assert row.shape == shape and rows.shape == (2, *shape) and np.array_equal(row, rows[0])
    label_map, maps = segment(*segmenter, image), segment(*segmenter, [image, other])
    assert label_map.ndim == 2 and isinstance(maps, list) and np.array_equal(label_map, maps[0])


def test_an_array_of_four_axes_is_a_batch(digits: Any, segmenter: Any) -> None:
    batch = np.stack([kinds(path)["array h w 3"] for path in PICTURES[:3]])
    assert beit_jax.classify(*digits, batch) == beit_jax.classify(*digits, list(batch))
    assert beit_jax.features(*digits, batch).shape == (3, 64)
    assert len(segment(*segmenter, batch)) == 3
    assert digits[1](batch).shape == (3, 32, 32, 3)


@pytest.mark.parametrize(("pooling", "shape"), [("pooled", (0, 64)), ("cls", (0, 64)), ("tokens", (0, 65, 64))])
def test_no_images_have_no_results(digits: Any, pooling: Any, shape: tuple[int, ...]) -> None:
    found = beit_jax.features(*digits, [], pooling=pooling)
    assert found.shape == shape and found.dtype == np.float32
    assert beit_jax.classify(*digits, []) == []


@pytest.mark.parametrize(
    ("wrong", "advice"), [("CLS", "cls"), ("average", "mean"), ("last_hidden_state", ""), (None, "")]
)
@pytest.mark.parametrize("images", [PICTURES[0], []])
def test_a_pooling_that_does_not_exist_is_not_another(
    digits: Any, images: Any, wrong: Any, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    with pytest.raises(BeitJaxError, match="pooling: expected pooled or mean or cls or tokens, found") as caught:
        beit_jax.features(*digits, images, pooling=wrong)
    assert str(caught.value).endswith(f"did you mean {advice}?" if advice else str(wrong))


def test_an_image_of_no_kind_is_named_by_its_place(digits: Any) -> None:
    wrong = np.zeros((4, 4, 4), np.float32)
    for images, name in ((wrong, "image 0"), ([PICTURES[0]] * 9 + [wrong], "image 9")):
        with pytest.raises(BeitJaxError, match=f"^{name}: expected an array "):
            beit_jax.classify(*digits, images, batch_size=2)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"image": PICTURES[0]}, "dict"),
        (io.BytesIO(PICTURES[0].read_bytes()), "BytesIO"),
        (PICTURES[0].read_bytes(), "bytes"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_named_by_its_type(
    digits: Any, wrong: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    for images in (wrong, [wrong]):
        with pytest.raises(
            BeitJaxError, match=f"image 0: expected a path, a PIL image or an array .h, w, channels., found {found}"
        ):
            beit_jax.features(*digits, images)


def test_what_is_being_traced_is_no_image(digits: Any) -> None:
    with pytest.raises(BeitJaxError, match="image 0: is no array in memory"):
        jax.jit(lambda image: digits[1](image))(np.zeros((4, 4, 3), np.uint8))


def test_a_model_without_aggregation_says_so() -> None:
    from flax import nnx

    config = beit_jax.BeitConfig(
        task="masked_image_modeling", image_size=(16, 16), patch_size=(8, 8), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, vocab_size=8, use_mask_token=True,
    )  # fmt: skip
    model = BeitForMaskedImageModeling(config, rngs=nnx.Rngs(0))
    with pytest.raises(BeitJaxError, match="no aggregation layers"):
        model(np.zeros((1, 16, 16, 3), np.float32), aggregate=True)


# --- Folders with a bad or a foreign picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve good pictures in two classes; a bad one; a ghost of macOS, a text, and a picture of a rarer format."""
    root = tmp_path / "pictures"
    for name in ("nine", "zero"):
        (root / name).mkdir(parents=True)
        for path in PICTURES:
            (root / name / path.name).write_bytes(path.read_bytes())
        (root / name / f"._{PICTURES[0].name}").write_bytes(b"Mac OS X")
        (root / name / "Thumbs.db").write_bytes(b"no picture")
    with Image.open(PICTURES[0]) as image:
        image.convert("RGB").save(root / "zero" / "rare.jp2")
    (root / "nine" / "bad.png").write_bytes(damaged_png())
    return root


GOOD = 13


def test_foreign_folders_are_left_out_and_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    bad = folder / "nine" / "bad.png"
    for name in ("__MACOSX", "@eaDir", ".git"):
        shutil.copytree(folder / "zero", folder / name)
    (folder / "nine" / "up").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    bad.rename(tmp_path / "elsewhere" / "bad.png")
    (folder / "nine" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "nine" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = image_files(folder)
    assert len(found) == GOOD + 1 and folder / "nine" / "linked" / "bad.png" in found and found == sorted(found)
    assert set(class_images(folder)) == {"nine", "zero"}


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(place: Path | str) -> Any:
        if Path(place).name == "zero":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(place)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(BeitJaxError, match=r"zero: cannot be read \(Permission denied\)"):
        image_files(folder)


def test_annotations_of_one_name_in_two_folders_are_not_exchanged(tmp_path: Path) -> None:
    """Pairs by the name alone once compared every image with the last map of its name."""
    for kind, names in (("images", ["a/0.jpg", "b/0.jpg", "a/1.jpg"]), ("maps", ["a/0.png", "b/0.png", "1.png"])):
        for name in names:
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / name).touch()
    images, maps = tmp_path / "images", tmp_path / "maps"
    assert annotated_images(images, maps) == [
        (images / "a" / "0.jpg", maps / "a" / "0.png"),
        (images / "a" / "1.jpg", maps / "1.png"),
        (images / "b" / "0.jpg", maps / "b" / "0.png"),
    ]
    (maps / "b" / "0.png").unlink()
    with pytest.raises(BeitJaxError, match=r"maps/b/0\.png: no such file.*1 of 3"):
        annotated_images(images, maps)


def test_classify_leaves_out_and_names(native: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "bad.png" in error(capsys, "classify", native, folder)
    assert main(["classify", str(native), str(folder), "--skip-bad", "--json", "--top", "1", "--batch-size", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(entry["image"]).name for entry in found if "error" in entry] == ["bad.png"]
    assert len(found) == GOOD + 1 and any(entry["image"].endswith("rare.jp2") for entry in found)
    alone = beit_jax.classify(*beit_jax.from_pretrained(native), [Path(e["image"]) for e in found if "classes" in e])
    assert [best[0].index for best in alone] == [e["classes"][0]["index"] for e in found if "classes" in e]
    assert main(["classify", str(native), str(folder), "--skip-bad"]) == 0
    assert "left out     " in (text := capsys.readouterr().out) and "bad.png: damaged" in text


def test_features_leave_out_and_name(
    native: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "f.npz"
    assert "bad.png" in error(capsys, "features", native, folder, "-o", output) and not output.exists()
    assert main(["features", str(native), str(folder), "-o", str(output), "--skip-bad"]) == 0
    assert "left out     " in capsys.readouterr().out
    with np.load(output) as found:
        assert found["features"].shape == (GOOD, 64)
        assert np.array_equal(found["features"], beit_jax.features(*beit_jax.from_pretrained(native), found["images"]))


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.thorough)])
def test_evaluate_leaves_out_and_names(
    workers: str, native: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", native, "--data", folder, "--workers", workers, "--eval-batch-size", "4"]
    assert "bad.png" in error(capsys, *arguments)
    assert main([*map(str, arguments), "--skip-bad", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == GOOD and len(found["left_out"]) == 1 and "bad.png" in found["left_out"][0]
    (folder / "nine" / "bad.png").unlink()
    assert main([*map(str, arguments), "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert {**found, "left_out": []} == without


def test_prepare_leaves_out_up_to_a_limit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "folder", str(folder), str(tmp_path / "data"), "--held-out", "0"]
    assert "bad.png" in error(capsys, *arguments)
    assert main([*arguments, "--skip-bad"]) == 0
    assert "left out     " in capsys.readouterr().out
    assert len(open_dataset(tmp_path / "data", "train")) == GOOD


@pytest.mark.parametrize("command", ["classify", "evaluate", "prepare"])
def test_more_than_the_limit_is_refused(
    command: str, native: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("worse.png", "worst.png"):
        (folder / "nine" / name).write_bytes(b"\x89PNG but no more")
    arguments = {
        "classify": ["classify", native, folder],
        "evaluate": ["evaluate", native, "--data", folder, "--workers", "0"],
        "prepare": ["prepare", "folder", folder, tmp_path / "data", "--held-out", "0"],
    }[command]
    message = error(capsys, *arguments, "--skip-bad")
    assert "3 of 16 images cannot be read" in message and "--max-bad 0.1 allows 2" in message
    assert main([*map(str, arguments), "--skip-bad", "--max-bad", "0.2"]) == 0  # the advice works


def test_where_no_image_can_be_read_nothing_is_computed(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(damaged_png())
    assert "none of 1 images" in error(capsys, "classify", native, tmp_path / "bad.png", "--skip-bad")
    assert "no images in this folder" in error(capsys, "classify", native, (tmp_path / "empty").mkdir() or
                                               tmp_path / "empty")  # fmt: skip


def test_segment_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_segmenter(tmp_path / "model", ("a", "b", "c"))
    (tmp_path / "rooms").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / "rooms" / f"{seed}.jpg")
    (tmp_path / "rooms" / "bad.png").write_bytes(damaged_png())
    arguments = ["segment", model, tmp_path / "rooms", "-o", tmp_path / "p", "--mask", tmp_path / "m"]
    assert "bad.png" in error(capsys, *arguments)
    assert not (tmp_path / "p").exists() and not (tmp_path / "m").exists()
    assert main([*map(str, arguments), "--skip-bad"]) == 0
    assert "left out     " in capsys.readouterr().out
    loaded = beit_jax.from_pretrained(model)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["0.png", "1.png", "2.png"]
    for seed in range(3):
        expected = segment(*loaded, tmp_path / "rooms" / f"{seed}.jpg")
        assert np.array_equal(read_label_map(tmp_path / "m" / f"{seed}.png"), expected)


def test_evaluating_segmentation_leaves_out_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_segmenter(tmp_path / "model", ("a", "b", "c"), do_reduce_labels=False)
    (tmp_path / "images").mkdir(), (tmp_path / "maps").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / "images" / f"{seed}.png")
        Image.fromarray(np.full(SIZE, seed, np.uint8)).save(tmp_path / "maps" / f"{seed}.png")
    arguments = ["evaluate", model, "--images", tmp_path / "images", "--annotations", tmp_path / "maps"]
    assert main([*map(str, arguments), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    picture().save(tmp_path / "images" / "logo.png")  # a picture that nobody annotated
    (tmp_path / "images" / "._0.png").write_bytes(b"Mac OS X")
    assert "logo.png" in error(capsys, *arguments)
    assert main([*map(str, arguments), "--skip-bad", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["left_out"]) == 1 and {**found, "left_out": []} == expected


def test_the_lister_knows_every_format_that_is_read() -> None:
    Image.init()
    assert {form for suffix, form in Image.registered_extensions().items() if suffix in SUFFIXES} == set(FORMATS)
