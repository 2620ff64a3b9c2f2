"""What a user names becomes images in order: files, folders, patterns, lists, archives, data sets."""

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_jax.bulk.files import expanded
from beit_jax.bulk.images import Names
from beit_jax.bulk.inputs import Listing, list_images
from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.images.files import open_image
from beit_jax.images.listing import named_images


def picture(seed: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)).save(file, format)
    return file.getvalue()


def names(listing: Listing) -> list[str]:
    return [name for name, _ in listing.facts(0, len(listing))]


def contents(listing: Listing) -> list[bytes]:
    return [image.read() for image in listing.images(0, len(listing))]


def archive(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=format) as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, name in enumerate(
        ("b/2.png", "b/1.png", "a.png", "b.png", "b-c/9.JPG", "c/deep/er/x.png", ".hidden.png")
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(place))
    (tmp_path / "photos" / "notes.md").write_text("no image")
    return tmp_path / "photos"


def test_folders_are_in_the_order_of_their_paths(folder: Path) -> None:
    found = names(list_images([folder, folder / "a.png"]))
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg") and path.name[0] != "."]
    assert found == [str(path) for path in [*sorted(paths), folder / "a.png"]]
    assert found == [str(path) for path in named_images([folder, folder / "a.png"])]


def test_an_unfinished_output_among_the_images_is_none(folder: Path) -> None:
    before = names(list_images([folder]))
    (folder / "f.npz.partial").mkdir()
    (folder / "f.npz.partial" / "x.png").write_bytes(picture(0))
    assert names(list_images([folder], leave_out=[folder / "f.npz.partial"])) == before
    assert len(names(list_images([folder]))) == len(before) + 1


def test_patterns_and_braces(folder: Path) -> None:
    assert [Path(name).name for name in names(list_images([f"{folder}/**/*.png"]))] == [
        "a.png", "1.png", "2.png", "b.png", "x.png",
    ]  # fmt: skip
    assert names(list_images([f"{folder}/b/{{2..1}}.png"])) == [f"{folder}/b/2.png", f"{folder}/b/1.png"]
    assert expanded("s-{008..011}.{a,b}") == [f"s-{n}.{end}" for n in ("008", "009", "010", "011") for end in "ab"]
    strange = folder / "[1]{a,b}.png"
    strange.write_bytes(picture(1))
    assert names(list_images([strange])) == [str(strange)]
    with pytest.raises(BeitJaxError, match="nothing has such a name"):
        list_images([f"{folder}/*.webp"])
    with pytest.raises(BeitJaxError, match="more than 1,000,000 names"):
        list_images(["{0..9999}{0..9999}.png"])


def test_lists(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    strange = os.fsdecode(b"\xff\n.png").replace("\n", " ")
    (folder / strange).write_bytes(picture(8))
    listed = folder / "list.txt"
    listed.write_bytes(b"b/2.png\r\n\n" + os.fsencode(strange) + b"\nb\n")
    expected = [str(folder / name) for name in ("b/2.png", strange, "b/1.png", "b/2.png")]
    assert names(list_images([f"@{listed}"])) == names(list_images([listed])) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{folder}/a.png\n".encode())))
    assert names(list_images(["-"])) == [f"{folder}/a.png"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BeitJaxError, match=r"empty\.txt: expected a path in every line, found none"):
        list_images([tmp_path / "empty.txt"])
    (tmp_path / "a.txt").write_text("b.txt\n")
    (tmp_path / "b.txt").write_text(f"{folder}\na.txt\n")
    with pytest.raises(BeitJaxError, match=r"a\.txt: names itself, or a list that names it; remove that line"):
        list_images([tmp_path / "a.txt"])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_in_webdatasets_layout(tmp_path: Path, format: int) -> None:
    long = "deep/" * (15 if format == tarfile.USTAR_FORMAT else 60) + "0003.jpg"
    members = {
        "0001.jpg": picture(1), "0001.json": b"{}", "0001.npy": b"no image", "0002.left.png": picture(2),
        "0002.right.PNG": picture(3), "._0002.png": b"of macOS", "a.b/0003.txt": b"", long: picture(4),
    }  # fmt: skip
    plain = archive(tmp_path / "s-0.tar", members, format)
    packed = tmp_path / "s-1.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    images = ["0001.jpg", "0002.left.png", "0002.right.PNG", long]
    listing = list_images([plain, packed])
    assert names(listing) == [f"{path}/{name}" for path in (plain, packed) for name in images]
    assert contents(listing) == [members[name] for name in images] * 2
    assert [image.read() for image in listing.images(3, 6)] == [members[name] for name in (*images[3:], *images[:2])]
    assert [image.read() for image in listing.images(6, 8)] == [members[name] for name in images[2:]]
    assert [image.read() for image in listing.images(5, 6)] == [members[images[1]]], "read again from the beginning"
    assert names(list_images([tmp_path])) == names(listing), "a folder of shards"
    assert names(list_images([f"{tmp_path}/s-{{0..0}}.tar"], members=["left.png", ".JPG"])) == [
        f"{plain}/{name}" for name in ("0001.jpg", "0002.left.png", long)
    ]


def test_arrays_are_images_where_there_are_no_pictures(tmp_path: Path) -> None:
    path = archive(tmp_path / "bands.tar", {"1.npy": b"a", "1.json": b"", "2.npy": b"b"})
    assert contents(list_images([path])) == [b"a", b"b"]


def test_what_is_no_regular_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as file:
        data = picture(0)
        whole = tarfile.TarInfo("1.png")
        whole.size = len(data)
        file.addfile(whole, io.BytesIO(data))
        for name, kind in (("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE), ("4.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.png"
            file.addfile(member)
    images = list(list_images([path]).images(0, 4))
    assert images[0].read() == data
    for image in images[1:]:
        with pytest.raises(BeitJaxError, match=rf"{image.name}: a link or a sparse or special file in an archive"):
            image.read()


def test_a_member_longer_than_its_file_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "one.tar", {"1.png": picture(0)})
    (image,) = list_images([path]).images(0, 1)
    os.truncate(path, 600)
    with pytest.raises(BeitJaxError, match=r"one\.tar/1\.png: the archive is cut off there"):
        image.read()


def test_few_archives_stay_open(tmp_path: Path) -> None:
    paths = [archive(tmp_path / f"{n}.tar", {"1.png": picture(n)}) for n in range(70)]
    before = len(os.listdir("/dev/fd"))
    assert contents(list_images(paths)) == [picture(n) for n in range(70)]
    assert len(os.listdir("/dev/fd")) <= before + 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-10240] + b"", "unfinished"),
        (lambda data: data[: len(data) // 2], "unfinished"),
        (lambda data: data + data, "more follows the end of the archive"),
        (lambda data: b"", "unfinished"),
        (lambda data: b"\0" * 10240, "no images in this archive"),
        (lambda data: b"x" * 2000, "no tar archive"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, change, message: str) -> None:
    path = archive(tmp_path / "x.tar", {f"{n}.png": bytes(3000) for n in range(8)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BeitJaxError, match=message):
        list_images([path])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no images given"),
        ([""], "found the empty name ''"),
        (["@"], "found the empty name '@'"),
        (["no.tar"], r"no\.tar: no such file"),
        (["@no.txt"], r"no\.txt: cannot be read"),
        (["https://a.org/cat.jpg"], r"^https://a\.org/cat\.jpg: .* found an address; download it"),
        (["gs://bucket/*.tar?x=1"], r"^gs://bucket/\*\.tar\?x=1: .* found an address"),
    ],
)
def test_what_is_not_there_is_named(inputs: Sequence[str], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        list_images(inputs)


def test_an_address_in_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("HTTP://a.org/cat.jpg\n")
    with pytest.raises(BeitJaxError, match=r"^HTTP://a\.org/cat\.jpg: .* found an address"):
        list_images([tmp_path / "list.txt"])


def test_an_address_is_named_where_one_image_is_read() -> None:
    with pytest.raises(BeitJaxError, match=r"an address, and nothing is fetched; give the path of an image file"):
        open_image(Path("https://a.org/cat.jpg"))


def test_members_of_no_archive_are_refused(folder: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"members jpg, left\.png: .* none of the images is in an archive"):
        list_images([folder], members=["jpg", "left.png"])


def test_names_take_little_memory_and_come_back() -> None:
    given = ["a", "", os.fsdecode(b"\xff\xfe"), "ö\n"] * 3
    assert list(Names(given)) == given and len(Names(given)) == 12


def test_a_digest_sees_names_order_and_changed_files(folder: Path) -> None:
    listing = list_images([folder])
    before, all_names = listing.digest(0, 3), listing.names_digest()
    assert before != listing.digest(1, 4)
    os.utime(names(listing)[0], ns=(1, 1))
    assert listing.digest(0, 3) != before and listing.names_digest() == all_names
    os.remove(names(listing)[0])
    assert len(listing.digest(0, 3)) == len(before)


def test_prepared_data(folder: Path, tmp_path: Path) -> None:
    from beit_jax.cli.main import main

    kinds = tmp_path / "kinds"
    for place, name in enumerate(("cat/1.png", "cat/2.png", "dog/3.png")):
        path = kinds / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(place))
    assert main(["prepare", "folder", str(kinds), str(tmp_path / "data"), "--held-out", "0"]) == 0
    listing = list_images([tmp_path / "data", f"{tmp_path}/data#train[:1]"])
    images = list(listing.images(0, len(listing)))
    assert len(images) == 4 and {image.read() for image in images[:3]} == {picture(place) for place in range(3)}
    assert images[3] == images[0] and Path(images[0].name).suffix == ".png"
    with pytest.raises(BeitJaxError, match="no split test, found train"):
        list_images([f"{tmp_path}/data#test"])
    with pytest.raises(BeitJaxError, match="tfds:no_such_set_at_all: TFDS finds no such data set here"):
        list_images(["tfds:no_such_set_at_all#train"])


def test_classify_refuses_an_empty_name_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "native", ""]) == 2
    assert "found the empty name ''" in capsys.readouterr().err
