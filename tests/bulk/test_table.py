"""Tables of any number of images: in order, gone on with, shared, the same byte for byte."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_jax.bulk import chunks, table
from beit_jax.bulk.chunks import Chunks, folder_of
from beit_jax.bulk.inputs import list_images
from beit_jax.bulk.table import Host, Outcome, Table
from beit_jax.bulk.tasks import Classes, Computing, Features
from beit_jax.bulk.work import Options, Work
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor

CONFIG = BeitConfig(
    image_size=(8, 8), patch_size=(4, 4), hidden_size=6, num_hidden_layers=1, num_attention_heads=1,
    intermediate_size=4, task="image_classification", labels=("a", "b", "c"),
)  # fmt: skip
COUNT = 23


def compute(pixels: np.ndarray, output: str) -> np.ndarray:
    """A model without JAX: each output depends on every pixel of its image."""
    flat = pixels.reshape(len(pixels), -1)
    width = {"logits": 3, "tokens": 30}.get(output, 6)
    found = np.stack([flat[:, n::width].sum(axis=1) for n in range(width)], axis=1).astype(np.float32)
    return found.reshape(len(pixels), 5, 6) if output == "tokens" else found


COMPUTING = Computing(CONFIG, ImageProcessor(resize=(8, 8)), compute, {"model": "m", "weights": "w"})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(folder / f"{n:02d}.png")
    return folder


def work(photos: Path, **options: Any) -> Work:
    options = {"batch_size": 2, "chunk": 4, "workers": 0, **options}
    return Work(COMPUTING, Features(), list_images([photos]), Options(**options))


def made(making: Work, output: Path, host: Host = Host()) -> Outcome:  # noqa: B008  # frozen
    return Table(making, output, host).make()


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "f.npz"
    outcome = made(work(photos), output)
    assert outcome == Outcome(COUNT, (COUNT, 6)) and not folder_of(output).exists()
    return output.read_bytes()


def test_rows_are_those_of_every_image_alone(photos: Path, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.npz").write_bytes(whole)
    paths = sorted(photos.iterdir())
    with np.load(tmp_path / "f.npz") as found:
        assert found["images"].tolist() == [str(path) for path in paths]
        expected = [compute(COMPUTING.processor(path), "pooled")[0] for path in paths]
        np.testing.assert_array_equal(found["features"], expected)


class Killed(BaseException):
    """Ends a run as a signal does that no program can catch."""


def kill_at(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int) -> None:
    original: Callable[..., Any] = getattr(target, name)
    calls = iter(range(call))

    def counted(*arguments: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(target, name, counted)


@pytest.mark.parametrize(("target", "name", "call"), [
    (Chunks, "write", 3), (chunks.os, "replace", 2), (chunks.os, "fsync", 0), (Chunks, "read", 2),
    (Chunks, "remove", 0),
])  # fmt: skip
def test_a_table_goes_on_where_it_was_killed(
    photos: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int
) -> None:
    output = tmp_path / "f.npz"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, target, name, call)
        made(work(photos), output)
    assert folder_of(output).exists()
    computed: list[int] = []

    def counting(pixels: np.ndarray, output: str) -> np.ndarray:
        computed.append(len(pixels))
        return compute(pixels, output)

    again = work(photos)
    outcome = made(replace(again, computing=replace(COMPUTING, compute=counting)), output)
    assert outcome == Outcome(COUNT, (COUNT, 6))
    assert output.read_bytes() == whole and not folder_of(output).exists()
    assert sum(computed) <= COUNT + 1 - 4 * min(call, 2) or name == "fsync"


def test_what_is_done_is_not_done_again_unless_its_image_changed(
    photos: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "f.npz"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, Chunks, "read", 0)
        made(work(photos), output)
    damaged = sorted(folder_of(output).glob("*.chunk"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    os.utime(photos / "10.png")
    seen: list[tuple[int, int]] = []
    original = Work.parts

    def watched(self: Work, ranges: Any, bad: Any) -> Iterator[Any]:
        seen.extend(ranges)
        return original(self, ranges, bad)

    monkeypatch.setattr(Work, "parts", watched)
    made(work(photos), output)
    assert seen == [(4, 8), (8, 12)] and output.read_bytes() == whole


def test_other_options_or_images_are_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "f.npz"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, Chunks, "write", 2)
        made(work(photos), output)
    fewer = replace(work(photos), listing=list_images([photos / "01.png"]))
    for other, message in (
        (work(photos, batch_size=4), "batch size 2, found 4"),
        (work(photos, chunk=8), "chunk 4, found 8"),
        (replace(work(photos), task=Features("cls")), "pooling pooled, found cls"),
        (fewer, "batch size 2, found 1"),
    ):
        with pytest.raises(BeitJaxError, match=rf"f\.npz\.partial: begun with {message}; give the same options"):
            made(other, output)
    assert len(list(folder_of(output).glob("*.chunk"))) == 2


def test_several_processes_make_the_same_table(photos: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "f.npz"
    first = made(work(photos), output, Host(0, 3))
    assert first.missing == (1, 2, 4, 5) and not output.exists()
    assert made(work(photos), output, Host(2, 3)).missing == (1, 4)
    assert made(work(photos), output, Host(1, 3)) == Outcome(COUNT, (COUNT, 6))
    assert output.read_bytes() == whole
    with pytest.raises(BeitJaxError, match="already exists, and other processes may be done with it"):
        made(work(photos), output, Host(1, 3))


def test_a_table_that_another_process_makes_is_refused(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.npz"
    held = work(photos)

    class Twice(Work):
        def parts(self, ranges: Any, bad: Any) -> Iterator[Any]:
            with pytest.raises(BeitJaxError, match=r"f\.npz: in use by process"):
                made(held, output)
            return super().parts(ranges, bad)

    assert made(Twice(held.computing, held.task, held.listing, held.options), output).images == COUNT


@pytest.fixture
def bad_photos(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "some"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:9]:
        (folder / path.name).write_bytes(
            path.read_bytes()[: 20 if path.name in ("03.png", "04.png", "05.png") else None]
        )
    return folder


def test_the_first_image_that_cannot_be_read_ends_the_run_and_what_is_done_is_kept(
    bad_photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "f.jsonl"
    with pytest.raises(BeitJaxError, match=r"03\.png: ") as raised:
        made(work(bad_photos), output)
    assert not hasattr(raised.value, "__notes__") and not folder_of(output).exists(), "nothing was done"
    with pytest.raises(BeitJaxError, match=r"03\.png: ") as raised:
        made(work(bad_photos, chunk=2), output)
    assert raised.value.__notes__[0].startswith("1 of 5 parts are kept in ")


def test_leaving_images_out_may_begin_and_end_on_the_way(bad_photos: Path, tmp_path: Path) -> None:
    output, at_once = tmp_path / "f.jsonl", tmp_path / "at once.jsonl"
    made(work(bad_photos, chunk=2, max_bad=0.4), at_once)
    with pytest.raises(BeitJaxError, match=r"03\.png: "):
        made(work(bad_photos, chunk=2), output)
    made(work(bad_photos, chunk=2, max_bad=0.4), output, Host(1, 2))
    with pytest.raises(BeitJaxError, match=r"03\.png: "):  # of a finished part; it is looked at again
        made(work(bad_photos, chunk=2), output)
    made(work(bad_photos, chunk=2, max_bad=0.4), output)
    assert output.read_bytes() == at_once.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_images_that_cannot_be_read_are_named_in_the_table(bad_photos: Path, tmp_path: Path, batch: int) -> None:
    import pyarrow.parquet

    output = tmp_path / "f.parquet"
    outcome = made(work(bad_photos, batch_size=batch, chunk=3, max_bad=0.4), output)
    assert outcome.shape == (6, 6) and len(outcome.bad) == 3
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert [row["features"] is None for row in rows] == [place in (3, 4, 5) for place in range(9)]
    assert all("04.png: " in rows[4]["error"] and rows[n]["error"] is None for n in (0, 8))
    with pytest.raises(BeitJaxError, match=r"2 of 9 images cannot be read, --max-bad 0\.1 allows 1"):
        made(work(bad_photos, batch_size=batch, chunk=3, max_bad=0.1), tmp_path / "g.npz")


def test_no_image_at_all_can_be_read(bad_photos: Path, tmp_path: Path) -> None:
    listing = list_images([bad_photos / "03.png", bad_photos / "04.png"])
    with pytest.raises(BeitJaxError, match="none of 2 images can be read"):
        made(replace(work(bad_photos, max_bad=1.0), listing=listing), tmp_path / "f.npz")


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(
    photos: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "f.npz"

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(chunks.os, "fsync", full)
        with pytest.raises(BeitJaxError, match=r"f\.npz: the disk is full; free space and run again"):
            made(work(photos), output)
    made(work(photos), output)
    assert output.read_bytes() == whole


def test_an_output_among_the_images_is_refused(photos: Path, tmp_path: Path) -> None:
    listing = list_images([photos])
    link = tmp_path / "out.npz"
    link.symlink_to(photos / "00.png")
    with pytest.raises(BeitJaxError, match="is an input itself"):
        made(replace(work(photos), listing=listing), link)


def test_a_folder_that_is_no_unfinished_table_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "f.npz.partial").mkdir()
    (tmp_path / "f.npz.partial" / "mine.txt").write_text("x")
    with pytest.raises(BeitJaxError, match=r"holds mine\.txt and no manifest\.json"):
        made(work(photos), tmp_path / "f.npz")
    assert (tmp_path / "f.npz.partial" / "mine.txt").exists()


def test_parts_of_a_finished_table_that_a_kill_left_are_removed(photos: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "f.npz"
    folder_of(output).mkdir()
    (folder_of(output) / "0000001.chunk").write_bytes(b"of another table")
    output.write_bytes(b"a finished table")
    with pytest.raises(BeitJaxError, match="already exists, and other processes may be done with it"):
        made(work(photos), output, Host(0, 2))
    made(work(photos), output)
    assert output.read_bytes() == whole and not folder_of(output).exists()


def test_a_chunk_is_a_multiple_of_the_batch_and_small_for_tokens(photos: Path) -> None:
    assert work(photos, batch_size=3, chunk=4).length == 6
    assert work(photos, batch_size=8, chunk=None).length == 512
    large = replace(CONFIG, image_size=(224, 224), patch_size=(16, 16), hidden_size=768)
    computing = replace(COMPUTING, config=large, processor=ImageProcessor())
    tokens = replace(work(photos, chunk=None), computing=computing, task=Features("tokens"))
    assert tokens.length == 110 and tokens.shape == (197, 768)


def test_devices_share_a_batch() -> None:
    shared = replace(COMPUTING, devices=8)
    assert [shared.size(*asked) for asked in ((8, 100), (8, 3), (12, 100))] == [8, 8, 16]
    assert COMPUTING.size(8, 3) == 3 and replace(COMPUTING, batch=4).size(8, 100) == 4


def test_processes_that_prepare_images_change_nothing(photos: Path, whole: bytes, tmp_path: Path) -> None:
    made(work(photos, workers=2), tmp_path / "f.npz")
    assert (tmp_path / "f.npz").read_bytes() == whole


def test_classes(photos: Path) -> None:
    making = replace(work(photos), task=Classes(CONFIG, 2))
    from beit_jax.images.bad_images import BadImages

    rows = [row for part in making.parts([(0, COUNT)], BadImages(COUNT)) for row in part.rows]
    assert (
        len(rows) == COUNT and [list(entry) for entry in rows[0]["classes"]] == [["index", "label", "probability"]] * 2
    )
    assert table.Outcome(1, None).missing == ()
