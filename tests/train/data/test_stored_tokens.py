"""Tokens that were stored are the tokens that would be computed, or an error says what differs."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from beit_jax.errors import BeitJaxError
from beit_jax.terminal import Advance
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.tokenizers.dvae import DvaeEncoder, DvaeEncoderConfig
from beit_jax.train.augmentation.masking import BlockMask
from beit_jax.train.augmentation.views import ViewsTransform
from beit_jax.train.data import stored_tokens
from beit_jax.train.data.batches import train_batches
from beit_jax.train.data.datasets import Dataset, open_dataset
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.data.stored_tokens import DESCRIPTION, TOKENS, StoredTokens, token_contract, write_tokens
from beit_jax.train.data.workers import Batch
from beit_jax.train.recipe import AugmentOptions, DataOptions, MaskOptions
from beit_jax.tree import flatten

SEED, RECORDS, POSITIONS, PATCHES, VOCABULARY = 3, 20, 45, 16, 300
CONFIG = DvaeEncoderConfig(n_hid=8, vocab_size=VOCABULARY, group_count=2, n_blk_per_group=1, image_size=(8, 8))
AUGMENT = AugmentOptions(color_jitter=0.4, interpolation="random")
VIEWS = ViewsTransform(AUGMENT, (16, 16), (8, 8), "lanczos", None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = prepare_digits(tmp_path_factory.mktemp("digits") / "data").directory
    return open_dataset(directory, f"train[:{RECORDS}]")


@pytest.fixture(scope="module")
def encoder() -> DvaeEncoder:
    return DvaeEncoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens_of(encoder: DvaeEncoder) -> Callable[[Batch], np.ndarray]:
    run = jax.jit(lambda images: encoder.tokens(images.astype(np.float32) / 255).reshape(len(images), -1))
    return lambda batch: np.asarray(run(batch["token_image"]))


def checkpoint(encoder: DvaeEncoder) -> TokenizerCheckpoint:
    state = flatten(nnx.to_pure_dict(nnx.state(encoder)))
    return TokenizerCheckpoint(CONFIG, {name: np.asarray(leaf) for name, leaf in state.items()})


@pytest.fixture(scope="module")
def contract(digits: Dataset, encoder: DvaeEncoder) -> dict[str, Any]:
    return token_contract(digits.contract(), SEED, VIEWS, checkpoint(encoder), "float32")


@contextmanager
def stream(dataset: Dataset, views: ViewsTransform, batch_size: int, **options: Any) -> Iterator[Iterator[Batch]]:
    with train_batches(dataset, DataOptions(batch_size, workers=0), views, seed=SEED, **options) as batches:
        yield batches


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    digits: Dataset,
    tokens_of: Callable[[Batch], np.ndarray],
    contract: dict[str, Any],
) -> Path:
    directory = tmp_path_factory.mktemp("tokens") / "stored"
    with stream(digits, VIEWS, 10, start_step=0) as batches:
        write(directory, batches, tokens_of, contract)
    return directory


def write(directory: Path, batches: Any, tokens_of: Any, contract: Any, **changes: Any) -> None:
    sizes = {"positions": POSITIONS, "patches": PATCHES, "vocab_size": VOCABULARY}
    write_tokens(directory, batches, tokens_of, contract, **sizes | changes)


def one_line(error: pytest.ExceptionInfo[BeitJaxError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# The same tokens


@pytest.mark.parametrize("hosts", [1, 2])
def test_stored_tokens_are_those_computed_on_the_fly(
    hosts: int,
    digits: Dataset,
    written: Path,
    tokens_of: Callable[[Batch], np.ndarray],
    contract: dict[str, Any],
) -> None:
    """Across two epochs; with other batches than they were written in, masks, and another view of the student's."""
    stored = StoredTokens.open(written, contract, digest=True)
    masked = replace(VIEWS, size=(32, 32), mask=BlockMask((4, 4), MaskOptions(patches=5, min_block=2)))
    seen, wrong = [], []
    for host in range(hosts):
        rows = np.arange(6)[host::hosts]
        with stream(digits, masked, 6, start_step=3, rows=rows) as batches:
            for step, batch in zip(range(3, 6), batches, strict=False):
                computed = tokens_of(batch)
                found = stored.at(6 * step + rows)
                assert (found.dtype, found.shape) == (np.int32, (6 // hosts, PATCHES))
                np.testing.assert_array_equal(found, computed)
                seen.append(found)
                wrong.append((stored.at(6 * (step + 1) + rows) == computed).mean())
    assert len(np.unique(seen)) > 10, "tokens that hardly differ prove nothing"
    assert np.mean(wrong) < 0.6, "tokens of any other step would have passed"


def test_a_tokenizer_that_sees_the_students_view(
    digits: Dataset, encoder: DvaeEncoder, contract: dict[str, Any]
) -> None:
    """VQ-KD's does: the view is then made as the student's is."""
    found = token_contract(digits.contract(), SEED, replace(VIEWS, token_size=None), checkpoint(encoder), "float32")
    assert (found["view"]["size"], found["view"]["interpolation"]) == ((16, 16), "random")
    assert (contract["view"]["size"], contract["view"]["interpolation"]) == ((8, 8), "lanczos")


def test_numpy_reads_the_file(written: Path, contract: dict[str, Any]) -> None:
    array = np.load(written / TOKENS)
    assert (array.dtype, array.shape) == (np.uint16, (POSITIONS, PATCHES))
    stored = StoredTokens.open(written, contract)
    np.testing.assert_array_equal(stored.at(np.arange(POSITIONS)), array)
    assert (stored.positions, stored.patches, stored.vocab_size) == (POSITIONS, PATCHES, VOCABULARY)
    assert stored.epochs == POSITIONS / RECORDS


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_every_token_of_a_vocabulary_can_be_stored(
    vocabulary: int, dtype: type, tmp_path: Path, contract: dict[str, Any]
) -> None:
    tokens = np.array([[0, vocabulary - 1], [vocabulary - 1, 1]])
    sizes = {"positions": 2, "patches": 2, "vocab_size": vocabulary}
    write_tokens(tmp_path / "stored", [{}], lambda batch: tokens, contract, **sizes)
    assert np.load(tmp_path / "stored" / TOKENS).dtype == dtype
    np.testing.assert_array_equal(StoredTokens.open(tmp_path / "stored", contract).at(np.array([1, 0])), tokens[::-1])


# Other images, another tokenizer


def changed(contract: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    *parents, last = name.split("/")
    result = json.loads(json.dumps(contract))
    node = result
    for parent in parents:
        node = node[parent]
    assert last not in node or node[last] != value
    node[last] = value
    return result


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 4),
        ("data/files", "1 with sizes 0"),
        ("data/pipeline", 9),
        ("view/size", [16, 16]),
        ("view/crop_scale", [0.2, 1.0]),
        ("view/color_jitter", 0.0),
        ("tokenizer/weights", "0"),
        ("tokenizer/dtype", "bfloat16"),
        ("tokenizer/unheard_of", None),
    ],
)
def test_what_differs_is_named(name: str, value: Any, written: Path, contract: dict[str, Any]) -> None:
    with pytest.raises(BeitJaxError, match=f"computed with {name} .*, now it is .*compute the tokens again") as error:
        StoredTokens.open(written, changed(contract, name, value))
    assert one_line(error).startswith(str(written))


def test_the_contract_holds_what_decides_tokens_and_nothing_else(
    digits: Dataset, encoder: DvaeEncoder, contract: dict[str, Any]
) -> None:
    def of(views: ViewsTransform = VIEWS, seed: int = SEED, dtype: str = "float32", weights: Any = None) -> Any:
        return token_contract(digits.contract(), seed, views, weights or checkpoint(encoder), dtype)

    assert of() == contract
    assert of(replace(VIEWS, mask=BlockMask((4, 4), MaskOptions(patches=5, min_block=2)), size=(32, 32))) == contract
    assert of(replace(VIEWS, options=replace(AUGMENT, erasing=0.1, smoothing=0.0))) == contract
    others = [
        of(replace(VIEWS, options=replace(AUGMENT, **{entry: value})))
        for entry, value in (
            ("flip", 0.0),
            ("crop_scale", (0.2, 1.0)),
            ("crop_ratio", (1.0, 1.0)),
            ("color_jitter", 0.1),
        )
    ]
    others += [of(replace(VIEWS, token_size=(16, 16))), of(replace(VIEWS, token_interpolation="bicubic"))]
    others += [of(seed=4), of(dtype="float16")]
    source = checkpoint(encoder)
    [name, *_] = source.params
    leaf = source.params[name].copy()
    leaf.reshape(-1)[-1] = np.nextafter(leaf.reshape(-1)[-1], np.float32(9))
    others.append(of(weights=replace(source, params=source.params | {name: leaf})))
    others.append(of(weights=replace(source, config=dataclasses.replace(CONFIG, image_size=(16, 16)))))
    assert all(other != contract for other in others)


# Files that are not what was written


def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:40],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"x" + data[1:],
        lambda data: data.replace(b"'<u2'", b"'<i2'"),
        lambda data: data.replace(b"False", b"True "),
        lambda data: data.replace(b"(45, 16)", b"(45, 15)"),
        lambda data: data.replace(b"(45, 16)", b"(90, 8) "),
        lambda data: data.replace(b"(45, 16)", b"(((((((("),
        lambda data: data.replace(b"'<u2'", b"'|O' "),
        lambda data: data.replace(b"{'descr'", b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    ],
)
def test_damaged_tokens(
    change: Callable[[bytes], bytes], written: Path, tmp_path: Path, contract: dict[str, Any]
) -> None:
    directory = copied(written, tmp_path)
    rewrite(directory / TOKENS, change)
    assert (directory / TOKENS).read_bytes() != (written / TOKENS).read_bytes()
    with pytest.raises(
        BeitJaxError, match=r"expected tokens \[45, 16\] by tokens.json, found .*copy it again"
    ) as error:
        StoredTokens.open(directory, contract)
    assert one_line(error).startswith(str(directory / TOKENS))


def test_a_changed_token_is_found_by_the_digest(written: Path, tmp_path: Path, contract: dict[str, Any]) -> None:
    directory = copied(written, tmp_path)
    rewrite(directory / TOKENS, lambda data: data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    StoredTokens.open(directory, contract)
    with pytest.raises(BeitJaxError, match="not what was written, by its digest"):
        StoredTokens.open(directory, contract, digest=True)


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(
    written: Path, tmp_path: Path, contract: dict[str, Any]
) -> None:
    directory = copied(written, tmp_path)
    rewrite(directory / TOKENS, lambda data: data[:-1] + b"\xff")
    stored = StoredTokens.open(directory, contract)
    stored.at(np.arange(POSITIONS - 1))
    with pytest.raises(BeitJaxError, match=r"tokens\.npy: expected tokens below 300, found 65"):
        stored.at(np.array([POSITIONS - 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"format": "other"}, "format: expected beit-jax stored tokens 1"),
        (lambda content: content | {"positions": 0}, "expected positive numbers"),
        (lambda content: content | {"positions": 44}, r"expected tokens \[44, 16\]"),
        (lambda content: content | {"patches": "16"}, "patches: expected an integer"),
        (lambda content: content | {"vocab_size": 1 << 20}, "expected tokens .* found uint16"),
        (lambda content: {key: content[key] for key in content if key != "contract"}, "contract: expected an object"),
    ],
)
def test_damaged_descriptions(
    change: Callable[[Any], Any], message: str, written: Path, tmp_path: Path, contract: dict[str, Any]
) -> None:
    directory = copied(written, tmp_path)
    content = json.loads((directory / DESCRIPTION).read_text())
    (directory / DESCRIPTION).write_text(json.dumps(change(content)))
    with pytest.raises(BeitJaxError, match=message) as error:
        StoredTokens.open(directory, contract)
    one_line(error)


@pytest.mark.parametrize(("name", "message"), [(DESCRIPTION, "no stored tokens here"), (TOKENS, "expected tokens")])
def test_missing_files(name: str, message: str, written: Path, tmp_path: Path, contract: dict[str, Any]) -> None:
    directory = copied(written, tmp_path)
    (directory / name).unlink()
    with pytest.raises(BeitJaxError, match=message) as error:
        StoredTokens.open(directory, contract)
    one_line(error)


def test_beyond_what_is_stored(written: Path, contract: dict[str, Any]) -> None:
    stored = StoredTokens.open(written, contract)
    with pytest.raises(
        BeitJaxError, match=r"45 images \(2.25 epochs\) are stored, image 47 of the run has none"
    ) as error:
        stored.at(np.arange(42, 48))
    one_line(error)
    with pytest.raises(IndexError):
        stored.at(np.array([-1]))


# Writing


def fake(count: int = 10) -> Iterator[Batch]:
    """Batches whose token is the position in the sequence."""
    for start in range(0, 1000, count):
        yield {"at": np.arange(start, start + count)}


def fake_tokens(batch: Batch) -> np.ndarray:
    return np.tile(batch["at"][:, None], (1, PATCHES)) % VOCABULARY


def test_batches_are_read_as_far_as_needed(tmp_path: Path, contract: dict[str, Any]) -> None:
    batches, done = fake(), []

    @contextmanager
    def progress(total: int) -> Iterator[Advance]:
        assert total == POSITIONS
        yield done.append

    write(tmp_path / "stored", batches, fake_tokens, contract, progress=progress)
    assert done == [10, 10, 10, 10, 5]
    assert next(batches)["at"][0] == 50
    stored = StoredTokens.open(tmp_path / "stored", contract, digest=True)
    np.testing.assert_array_equal(stored.at(np.arange(POSITIONS))[:, 3], np.arange(POSITIONS))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["stored", DESCRIPTION, TOKENS]


@pytest.mark.parametrize(
    ("tokens_of", "message"),
    [
        (lambda batch: fake_tokens(batch)[:, 1:], r"tokens: expected integers \[b, 16\], found int64 \[10, 15\]"),
        (lambda batch: fake_tokens(batch).astype(np.float32), "expected integers"),
        (lambda batch: fake_tokens(batch) + 299, "tokens: expected 0 to 299, found 299 to 308"),
        (lambda batch: fake_tokens(batch) - 1, "tokens: expected 0 to 299, found -1 to 8"),
    ],
)
def test_tokens_that_cannot_be_stored(
    tokens_of: Callable[[Batch], np.ndarray], message: str, tmp_path: Path, contract: dict[str, Any]
) -> None:
    with pytest.raises(BeitJaxError, match=message):
        write(tmp_path / "stored", fake(), tokens_of, contract)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_what_failed(tmp_path: Path, contract: dict[str, Any]) -> None:
    with pytest.raises(BeitJaxError, match="the images ended 25 before the 45 to be stored"):
        write(tmp_path / "stored", islice(fake(), 2), fake_tokens, contract)
    with pytest.raises(BeitJaxError, match="expected tokens of at least one image"):
        write(tmp_path / "stored", fake(), fake_tokens, contract, positions=0)
    with pytest.raises(BeitJaxError, match="bytes are needed"):
        write(tmp_path / "stored", fake(), fake_tokens, contract, positions=1 << 50)
    assert not list(tmp_path.iterdir())


def test_what_is_read_back_otherwise_is_not_kept(
    tmp_path: Path, contract: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(directory: Path) -> None:
        rewrite(directory / TOKENS, lambda data: data[:-2] + bytes([data[-2] ^ 1, data[-1]]))

    monkeypatch.setattr(stored_tokens, "synchronise", damage)
    with pytest.raises(BeitJaxError, match="not what was written"):
        write(tmp_path / "stored", fake(), fake_tokens, contract)
    assert not list(tmp_path.iterdir())


def test_only_stored_tokens_are_replaced(tmp_path: Path, contract: dict[str, Any]) -> None:
    directory = tmp_path / "stored"
    write(directory, fake(), fake_tokens, contract)
    with pytest.raises(BeitJaxError, match="already exists"):
        write(directory, fake(), fake_tokens, contract)
    write(directory, fake(), fake_tokens, contract, positions=20, overwrite=True)
    assert StoredTokens.open(directory, contract).positions == 20
    (directory / DESCRIPTION).rename(directory / "precious")
    with pytest.raises(BeitJaxError, match="holds no stored tokens"):
        write(directory, fake(), fake_tokens, contract, overwrite=True)
    assert (directory / "precious").is_file()
