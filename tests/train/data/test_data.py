"""Batches as a pure function of seed and step, whoever computes them; and what a data set promises.

The pictures of the data set made here say which record they are, and the transform used here says what it drew: a batch
shows its records and their randomness in its pixels.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor, Within
from beit_jax.train.augmentation.classification import Transform, train_transform
from beit_jax.train.augmentation.segmentation import segmentation_transform
from beit_jax.train.data import shards
from beit_jax.train.data.batches import Batches, train_batches
from beit_jax.train.data.datasets import Dataset, SegmentationDataset, open_dataset, open_segmentation
from beit_jax.train.data.evaluation_batches import Images, eval_batches
from beit_jax.train.data.prepare import prepare_ade20k, write
from beit_jax.train.data.sources import Source, Split, classification_features
from beit_jax.train.data.workers import Batch
from beit_jax.train.objectives.segmentation import SegmentationOptions
from beit_jax.train.recipe import AugmentOptions, DataOptions

RECORDS, BATCH = 23, 8  # a batch divides no epoch
LABELS = ("ant", "bee", "cat")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make(
    directory: Path, images: Sequence[bytes], labels: Sequence[str] = LABELS, split: str = "train", name: str = "tiny"
) -> Path:
    """A data set of these files, whatever they hold; record i has the label i mod the number of labels."""
    examples = [
        {"image": data, "label": i % len(labels), "file_name": f"image_{i}.png"} for i, data in enumerate(images)
    ]
    source = Source(
        name,
        "",
        tuple(labels),
        classification_features(labels),
        {split: Split(len(examples), examples)},
        0,
        lambda example: None,
    )
    return write(source, directory).directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """RECORDS records in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 600)
        directory = make(tmp_path_factory.mktemp("tiny") / "data", [picture(i) for i in range(RECORDS)])
    assert len(list(directory.glob("*array_record*"))) > 2
    return open_dataset(directory, "train")


def marking() -> Transform:
    """Pixels [2, 2, 3]: the record in the first, what was drawn in the others. Inside a function: sent by value."""

    def transform(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        drawn[0, 0] = image[0, 0]
        return drawn

    return transform


def batches(dataset: Dataset, count: int, transform: Transform | None = None, **changes: Any) -> list[Batch]:
    options = DataOptions(batch_size=changes.pop("batch_size", BATCH), workers=changes.pop("workers", 0), max_bad=0.5)
    arguments = {"seed": 0, "start_step": 0} | changes
    with train_batches(dataset, options, transform or marking(), **arguments) as stream:
        return list(islice(stream, count))


def joined(parts: Sequence[Batch], key: str = "image") -> np.ndarray:
    return np.concatenate([part[key] for part in parts])


def record_of(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0, 0].astype(int)


def assert_equal(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() == {"image", "label"}
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


# The sequence


def test_a_batch_is_what_it_says(tiny: Dataset) -> None:
    for batch in batches(tiny, 4):
        assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (BATCH, 2, 2, 3))
        assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (BATCH,))
        np.testing.assert_array_equal(batch["label"], record_of(batch["image"]) % len(LABELS))


def test_every_epoch_is_another_permutation_with_other_randomness(tiny: Dataset) -> None:
    images = joined(batches(tiny, RECORDS))  # that is BATCH epochs
    epochs = record_of(images).reshape(BATCH, RECORDS)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(RECORDS), (BATCH, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == BATCH
    assert len({image[0, 1:].tobytes() + image[1].tobytes() for image in images}) == len(images)


def test_seed_decides(tiny: Dataset) -> None:
    assert_equal(batches(tiny, 3, seed=5), batches(tiny, 3, seed=5))
    first, other = (joined(batches(tiny, 3, seed=seed)) for seed in (5, 6))
    assert (record_of(first) != record_of(other)).any() and not (first == other).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("start", [1, 4, 7, 300])
def test_resuming_needs_the_step_alone(start: int, tiny: Dataset) -> None:
    """4 is in the middle of the second epoch, 300 in that of the 105th."""
    assert_equal(batches(tiny, 2, start_step=start), batches(tiny, start + 2)[start:])


def rows(host: int, hosts: int) -> np.ndarray:
    """A host's rows of a batch: every so many-th, which no slice of the sequence of images is."""
    return np.arange(BATCH)[host::hosts]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_divide_the_batch_and_change_nothing(hosts: int, tiny: Dataset) -> None:
    whole = batches(tiny, 6)
    for host in range(hosts):
        part = batches(tiny, 6, rows=rows(host, hosts))
        assert_equal(part, [{key: value[host::hosts] for key, value in batch.items()} for batch in whole])


def test_hosts_draw_different_randomness(tiny: Dataset) -> None:
    parts = [joined(batches(tiny, 6, rows=rows(host, 2))) for host in (0, 1)]
    assert not (parts[0][:, 1] == parts[1][:, 1]).all(axis=(1, 2)).any()


def test_workers_hosts_and_resuming_together_change_nothing(tiny: Dataset) -> None:
    whole = batches(tiny, 9)
    part = batches(tiny, 5, workers=2, start_step=4, rows=rows(1, 2))
    assert_equal(part, [{key: value[1::2] for key, value in batch.items()} for batch in whole[4:]])


def test_the_real_transform_is_pure_too(tiny: Dataset) -> None:
    transform = train_transform(AugmentOptions(), (16, 16), (0.5, 0.5, 0.5))
    whole = batches(tiny, 5, transform)
    assert whole[0]["image"].shape == (BATCH, 16, 16, 3)
    assert_equal(batches(tiny, 2, transform, start_step=3), whole[3:])
    part = batches(tiny, 5, transform, rows=rows(1, 2))
    assert_equal(part, [{key: value[1::2] for key, value in batch.items()} for batch in whole])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_records_than_a_batch(count: int, tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path / "data", [picture(i) for i in range(count)]), "train")
    records = record_of(joined(batches(dataset, 3)))
    full = len(records) // count * count
    np.testing.assert_array_equal(
        np.sort(records[:full].reshape(-1, count), axis=1), np.tile(np.arange(count), (full // count, 1))
    )


# What cannot be read


def holed(tmp_path: Path, bad: Sequence[int], count: int = RECORDS) -> Dataset:
    images = [b"no image" if i in bad else picture(i) for i in range(count)]
    return open_dataset(make(tmp_path / "data", images), "train")


def test_bad_records_are_replaced_and_the_others_stay(tiny: Dataset, tmp_path: Path) -> None:
    bad = (3, 17)
    whole, patched = (joined(batches(dataset, RECORDS)) for dataset in (tiny, holed(tmp_path, bad)))
    affected = np.isin(record_of(whole), bad)
    assert affected.sum() == BATCH * len(bad)
    np.testing.assert_array_equal(patched[~affected], whole[~affected])
    assert not np.isin(record_of(patched), bad).any()
    np.testing.assert_array_equal(patched[affected][:, 1], whole[affected][:, 1])  # the place's own randomness
    for record in bad:  # one stands in for it at all times
        assert len(set(record_of(patched[record_of(whole) == record]))) == 1


def test_labels_follow_the_replacement(tmp_path: Path) -> None:
    for batch in batches(holed(tmp_path, range(0, RECORDS, 3)), RECORDS):
        np.testing.assert_array_equal(batch["label"], record_of(batch["image"]) % len(LABELS))


@pytest.mark.parametrize("hosts", [2, 4])
def test_replacement_is_the_same_for_all_hosts(hosts: int, tmp_path: Path) -> None:
    dataset = holed(tmp_path, (3, 4, 17))
    whole = batches(dataset, 6)
    for host in range(hosts):
        part = batches(dataset, 6, rows=rows(host, hosts))
        assert_equal(part, [{key: value[host::hosts] for key, value in batch.items()} for batch in whole])


def stream_of(dataset: Dataset, max_bad: float, workers: int = 0) -> Any:
    options = DataOptions(batch_size=BATCH, workers=workers, max_bad=max_bad)
    return train_batches(dataset, options, marking(), seed=0, start_step=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_records_are_replaced_counted_and_named_whoever_met_them(workers: int, tmp_path: Path) -> None:
    dataset, epochs = holed(tmp_path, (3, 17)), 4
    with stream_of(dataset, 2 / RECORDS, workers) as stream:
        found = list(islice(stream, epochs * RECORDS // BATCH + 1))
        assert_equal(found, batches(dataset, len(found)))
        assert stream.bad.limit == 2
        assert set(stream.bad.reasons) == {3, 17}
        assert stream.bad.replaced in range(2 * epochs, 2 * epochs + 3)
        shard = "tiny-train.array_record-00000-of-00001"
        assert stream.bad.reasons[17].startswith(
            f"{shard}: record 17 (image_17.png): not a readable image: expected one of"
        )


def drain(stream: Batches, count: int = RECORDS) -> None:
    for _ in range(count):
        next(stream)


def test_more_bad_records_than_allowed_end_the_run(tmp_path: Path) -> None:
    dataset = holed(tmp_path, (3, 17))
    with stream_of(dataset, 1.9 / RECORDS) as stream:
        message = r"2 of 23 records cannot be read, --data.max-bad 0.0826087 allows 1; the last: tiny-train.*: record "
        with pytest.raises(BeitJaxError, match=message) as caught:
            drain(stream)
        assert "\n" not in str(caught.value)
        with pytest.raises(BeitJaxError, match="reading has ended"):  # going on would shift what follows
            next(stream)


def test_one_bad_record_is_too_many_for_a_small_data_set(tmp_path: Path) -> None:
    with stream_of(holed(tmp_path, [5]), 0.001) as stream, pytest.raises(BeitJaxError, match="1 of 23 records"):
        drain(stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_records(workers: int, tmp_path: Path) -> None:
    with (
        stream_of(holed(tmp_path, range(RECORDS)), 1.0, workers) as stream,
        pytest.raises(BeitJaxError, match=r"16 records in a row cannot be read; the last: tiny-train.*: record \d+"),
    ):
        next(stream)


def test_a_record_that_can_be_read_at_second_sight_ends_the_run(tmp_path: Path) -> None:
    """A batch that depends on the weather is not a function of seed and step."""
    dataset = holed(tmp_path, [5])
    with stream_of(dataset, 1.0) as stream:
        drain(stream, 1)
        stream._dataset = open_dataset(make(tmp_path / "good", [picture(i) for i in range(RECORDS)]), "train")
        with pytest.raises(BeitJaxError, match="record 5: could not be read at first"):
            drain(stream)


# Evaluation


PROCESSOR = ImageProcessor(resize=(4, 4), resample="bicubic")


def interleaved(parts: Sequence[Batch]) -> Batch:
    """The global batch of hosts' parts."""
    return {
        key: np.stack([part[key] for part in parts], axis=1).reshape(-1, *parts[0][key].shape[1:]) for key in parts[0]
    }


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 24, 32])
def test_evaluation_sees_every_record_once(hosts: int, batch_size: int, tiny: Dataset) -> None:
    parts = [
        list(eval_batches(tiny, PROCESSOR, batch_size, process_index=host, process_count=hosts, workers=0))
        for host in range(hosts)
    ]
    assert {len(part) for part in parts} == {-(-RECORDS // batch_size)}
    for part in parts:
        for batch in part:
            assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
                "image": ("float32", (batch_size // hosts, 4, 4, 3)),
                "label": ("int32", (batch_size // hosts,)),
                "index": ("int32", (batch_size // hosts,)),
                "valid": ("bool", (batch_size // hosts,)),
            }
            np.testing.assert_array_equal(batch["valid"], batch["index"] >= 0)
    together = [interleaved(step) for step in zip(*parts, strict=True)]
    valid = joined(together, "valid")
    np.testing.assert_array_equal(joined(together, "index")[valid], np.arange(RECORDS))
    np.testing.assert_array_equal(joined(together, "label")[valid], np.arange(RECORDS) % len(LABELS))
    expected = PROCESSOR([Image.open(io.BytesIO(picture(i))) for i in range(RECORDS)])
    np.testing.assert_array_equal(joined(together)[valid], expected)


def test_evaluation_with_workers_is_the_same(tiny: Dataset) -> None:
    expected = list(eval_batches(tiny, PROCESSOR, 8, workers=0))
    found = list(eval_batches(tiny, PROCESSOR, 8, workers=1))
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_evaluation_may_be_left_early(tiny: Dataset) -> None:
    stream: Iterator[Batch] = eval_batches(tiny, PROCESSOR, 4, workers=0)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_evaluation_leaves_no_record_out(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"image_5.png: not a readable image"):
        list(eval_batches(holed(tmp_path, [5]), PROCESSOR, 8, workers=0))


@pytest.mark.parametrize("resize", [4, Within(4, 16), None])
def test_evaluation_needs_images_of_one_size(resize: Any, tiny: Dataset) -> None:
    with pytest.raises(BeitJaxError, match="images of one size make a batch"):
        eval_batches(tiny, ImageProcessor(resize=resize), 4)
    assert len(list(eval_batches(tiny, ImageProcessor(resize=resize, crop=(4, 4)), 8, workers=0))) == 3


def test_anything_with_records_can_be_evaluated(tiny: Dataset) -> None:
    class Reversed:
        directory = Path("reversed")
        target = tiny.target

        def __len__(self) -> int:
            return RECORDS

        def __getitem__(self, index: int) -> dict[str, Any]:
            return dict(tiny[RECORDS - 1 - index])

    images: Images = Reversed()
    found = list(eval_batches(images, PROCESSOR, RECORDS, workers=0))
    expected = list(eval_batches(tiny, PROCESSOR, RECORDS, workers=0))
    np.testing.assert_array_equal(found[0]["image"], expected[0]["image"][::-1])


# Arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "--run.seed: expected 0 to 4294967295, found -1"),
        ({"seed": 2**32}, "--run.seed: expected 0 to 4294967295"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, int], message: str, tiny: Dataset) -> None:
    with pytest.raises(BeitJaxError, match=message):
        batches(tiny, 1, **changes)


# Data sets


def test_indexing(tiny: Dataset) -> None:
    assert len(tiny) == RECORDS and tiny.labels == LABELS and tiny.name == "tiny 1.0.0"
    assert list(tiny) == [{"image": picture(i), "label": i % 3, "file_name": f"image_{i}.png"} for i in range(RECORDS)]
    for index in (-1, RECORDS):
        with pytest.raises(IndexError):
            tiny[index]


def test_every_record_has_a_place(tiny: Dataset) -> None:
    places = [tiny.where(index) for index in range(RECORDS)]
    expected = [f"{shard.name}: record {i}" for shard in tiny.shards for i in range(shard.take)]
    assert places == expected


def test_part_of_a_split(tiny: Dataset) -> None:
    part = open_dataset(tiny.directory, "train[8:20]")
    assert [record["file_name"] for record in part] == [f"image_{i}.png" for i in range(8, 20)]
    assert [part.where(i) for i in range(12)] == [tiny.where(i) for i in range(8, 20)]
    assert set(record_of(joined(batches(part, 3)))) == set(range(8, 20))


def test_contract_is_the_data_and_not_its_place(tiny: Dataset, tmp_path: Path) -> None:
    contract = tiny.contract()
    assert json.loads(json.dumps(contract)) == contract
    moved = open_dataset(Path(shutil.copytree(tiny.directory, tmp_path / "moved")), "train")
    assert moved.contract() == contract


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda at: make(at, [picture(i) for i in range(RECORDS - 1)]), {"records", "files"}),
        (lambda at: make(at, [picture(i) + bytes(70_000) for i in range(RECORDS)]), {"files"}),
        (lambda at: make(at, [picture(i) for i in range(RECORDS)], ("ant", "bee", "dog")), {"classes"}),
        (lambda at: make(at, [picture(i) for i in range(RECORDS)], name="other"), {"dataset", "files"}),
    ],
)
def test_contract_says_what_changed(change: Callable[[Path], Path], keys: set[str], tmp_path: Path) -> None:
    before = open_dataset(make(tmp_path / "before", [picture(i) for i in range(RECORDS)]), "train").contract()
    after = open_dataset(change(tmp_path / "after"), "train").contract()
    assert {key for key in before if before[key] != after[key]} == keys
    assert before.keys() == after.keys()


def test_data_that_tfds_prepared(tmp_path: Path) -> None:
    """By TFDS' own writer: shuffled on disk, compressed, without file names."""

    class Stock(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.1.4")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(RECORDS):
                yield i, {"image": io.BytesIO(picture(i)), "label": i % 3}

    builder = Stock(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    dataset = open_dataset(Path(builder.data_dir), "train")
    assert dataset.name == "stock 3.1.4" and dataset.labels == ("0", "1", "2")
    assert dataset[0]["file_name"] == "stock-train.array_record-00000-of-00001: record 0"
    images = joined(batches(dataset, RECORDS))
    assert sorted(record_of(images)) == sorted(list(range(RECORDS)) * BATCH)
    with pytest.raises(BeitJaxError, match=r"no data set here .* did you mean .*stock/3.1.4\?"):
        open_dataset(tmp_path, "train")


# Segmentation


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def label_map(number: int) -> np.ndarray:
    """As ADE20K stores it: 0 for none, and the class 2 * number + 1 or the one after it, counted from 1."""
    values = np.full((12, 16), 2 * number + 1, np.uint8)
    values[:, 8:] += 1
    values[0] = 0
    return values


def scenes(directory: Path, maps: dict[int, bytes] | None = None, images: dict[int, bytes] | None = None) -> Path:
    """Prepared data of RECORDS images that show their number, of which some may have other files."""
    root = directory / "ADEChallengeData2016"
    for part, count in (("training", RECORDS), ("validation", 1)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for i in range(count):
            (root / "images" / part / f"{i:02d}.png").write_bytes(png(np.full((12, 16, 3), i, np.uint8)))
            (root / "annotations" / part / f"{i:02d}.png").write_bytes(png(label_map(i)))
    done = prepare_ade20k(root, directory / "data").directory
    return _rewritten(done, maps or {}, images or {}) if maps or images else done


def _rewritten(directory: Path, maps: dict[int, bytes], images: dict[int, bytes]) -> Path:
    """The training records with other files, which `prepare` would not have let pass."""
    builder = tfds.builder_from_directory(directory)
    good = open_segmentation(directory, "train")
    examples = [
        {**good[i], "image": images.get(i, good[i]["image"]), "segmentation": maps.get(i, good[i]["segmentation"])}
        for i in range(len(good))
    ]
    source = Source(
        "ade20k_semantic",
        "",
        (),
        builder.info.features,
        {"train": Split(len(examples), examples)},
        0,
        lambda example: None,
    )
    return write(source, directory.with_name("rewritten")).directory


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    return open_segmentation(scenes(tmp_path_factory.mktemp("scenes")), "train")


def segmentation_batches(dataset: SegmentationDataset, count: int, **changes: Any) -> list[Batch]:
    options = DataOptions(batch_size=BATCH, workers=changes.pop("workers", 0), max_bad=0.5)
    augment = SegmentationOptions(scale=(32, 24), photometric=changes.pop("photometric", True))
    arguments = {"seed": 0, "start_step": 0} | changes
    with train_batches(dataset, options, segmentation_transform(augment, 20), **arguments) as stream:
        return list(islice(stream, count))


def records_of_maps(labels: np.ndarray) -> np.ndarray:
    """Which record each label map is of; -1 if it shows no class."""
    return np.where(labels == 255, -1, labels // 2).max(axis=(1, 2))


def test_a_segmentation_record(segmented: SegmentationDataset) -> None:
    assert len(segmented) == RECORDS and segmented.name == "ade20k_semantic 1.0.0"
    assert (len(segmented.labels), segmented.labels[0], segmented.labels[-1]) == (150, "LABEL_0", "LABEL_149")
    assert segmented[4]["file_name"] == "training/04.png" and segmented[4]["segmentation"] == png(label_map(4))
    image, labels = segmented.load(4)
    assert (image.dtype, image.shape, tuple(image[3, 3])) == (np.uint8, (12, 16, 3), (4, 4, 4))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.repeat([[255] * 16, [8] * 8 + [9] * 8], [1, 11], axis=0))
    with pytest.raises(IndexError):
        segmented.load(RECORDS)


def test_contract_of_segmentation(segmented: SegmentationDataset, tmp_path: Path) -> None:
    contract = segmented.contract()
    assert json.loads(json.dumps(contract)) == contract
    assert (contract["records"], contract["classes"][:15]) == (RECORDS, "150 with names ")
    moved = open_segmentation(Path(shutil.copytree(segmented.directory, tmp_path / "moved")), "train")
    assert moved.contract() == contract
    fewer = open_segmentation(segmented.directory, "train[:9]").contract()
    assert {key for key in fewer if fewer[key] != contract[key]} == {"split", "records", "files"}


def test_data_of_the_other_kind(tiny: Dataset, segmented: SegmentationDataset) -> None:
    with pytest.raises(BeitJaxError, match=r"expected image .Image. and segmentation .Image., found .*label .ClassL"):
        open_segmentation(tiny.directory, "train")
    with pytest.raises(BeitJaxError, match=r"expected image .Image. and label .ClassLabel., .*found .*segmentation"):
        open_dataset(segmented.directory, "train")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            png(np.full((12, 16), 151, np.uint8)),
            "reduced segmentation: label 150 at row 0, column 0, expected 0 to 149",
        ),
        (png(np.full((12, 16), 300, np.uint16)), "reduced segmentation: label 299 at row 0"),
        (png(np.zeros((16, 12), np.uint8)), "segmentation of 12x16 pixels, expected 16x12 as its image"),
        (png(np.zeros((12, 16, 3), np.uint8)), "segmentation: mode RGB holds colours"),
        (b"no image", "segmentation: not a readable PNG"),
        (png(np.zeros((12, 16), np.uint8))[:45], "segmentation: not a readable PNG"),
    ],
    ids=["class", "class of 16 bits", "size", "colours", "no image", "cut off"],
)
def test_segmentations_that_cannot_be_used(stored: bytes, message: str, tmp_path: Path) -> None:
    dataset = open_segmentation(scenes(tmp_path, {5: stored}), "train")
    name = r"ade20k_semantic-train.array_record-00000-of-00001: record 5 \(training/05.png\)"
    with pytest.raises(BeitJaxError, match=rf"^{name}:? ?{message}") as caught:
        dataset.load(5)
    assert "\n" not in str(caught.value)
    dataset.load(4)


def test_ignored_pixels_may_be_stored_as_such(tmp_path: Path) -> None:
    stored = np.full((12, 16), 255, np.uint8)
    _, labels = open_segmentation(scenes(tmp_path, {5: png(stored)}), "train").load(5)
    np.testing.assert_array_equal(labels, stored)


def test_a_batch_of_segmentation(segmented: SegmentationDataset) -> None:
    parts = segmentation_batches(segmented, 23, photometric=False)
    for batch in parts:
        assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (BATCH, 20, 20, 3))
        assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (BATCH, 20, 20))
        records = records_of_maps(batch["label"])
        np.testing.assert_array_equal(records, batch["image"].max(axis=(1, 2, 3)))
        assert (batch["label"] != 255).any(axis=(1, 2)).all()
    epochs = records_of_maps(joined(parts, "label")).reshape(BATCH, RECORDS)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(RECORDS), (BATCH, 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_segmentation_batches_are_a_function_of_the_step(workers: int, segmented: SegmentationDataset) -> None:
    whole = segmentation_batches(segmented, 5)
    for host in (0, 1):
        part = segmentation_batches(segmented, 3, workers=workers, start_step=2, rows=rows(host, 2))
        assert_equal(part, [{key: value[host::2] for key, value in batch.items()} for batch in whole[2:]])
    assert (joined(segmentation_batches(segmented, 5, seed=1), "label") != joined(whole, "label")).any()


def test_bad_segmentation_records_are_replaced(segmented: SegmentationDataset, tmp_path: Path) -> None:
    bad = (3, 17)
    dataset = open_segmentation(
        scenes(tmp_path, {3: png(np.full((12, 16), 151, np.uint8))}, {17: b"no image"}), "train"
    )
    whole, patched = (segmentation_batches(data, RECORDS) for data in (segmented, dataset))
    affected = np.isin(records_of_maps(joined(whole, "label")), bad)
    assert affected.sum() == BATCH * len(bad)
    for key in ("image", "label"):
        np.testing.assert_array_equal(joined(patched, key)[~affected], joined(whole, key)[~affected])
    assert not np.isin(records_of_maps(joined(patched, "label")), bad).any()
    options = DataOptions(batch_size=BATCH, workers=0, max_bad=0.5)
    transform = segmentation_transform(SegmentationOptions(scale=(32, 24)), 20)
    with train_batches(dataset, options, transform, seed=0, start_step=0) as stream:
        drain(stream, RECORDS)
        assert set(stream.bad.reasons) == set(bad)
        assert "record 3 (training/03.png): reduced segmentation: label 150" in stream.bad.reasons[3]
