"""Visual tokens that are computed once, and read in every run that sees the same images.

The seed gives an endless sequence of images (`batches.train_batches`). The position of an image in it decides the
image's record and its augmentation, and so its tokens. On any number of hosts, image i of the batch of step s with b
images has the position s * b + i. A directory holds tokens in the order of positions: ``tokens.npy``, uint16 or uint32
[positions, patches], and ``tokens.json``, which says what they were computed from.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Final, Protocol, runtime_checkable

import numpy as np
import xxhash
from jaxtyping import Int, Int32

from beit_jax.atomic import Contents, check_destination, new_directory
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, has_value, read_json, write_json
from beit_jax.terminal import Progress, no_progress
from beit_jax.tree import flatten

from ..augmentation.views import ViewsTransform
from ..checkpoints.digests import synchronise, synchronise_entry
from .workers import Batch

TOKENS, DESCRIPTION = "tokens.npy", "tokens.json"
FORMAT: Final = "beit-jax stored tokens 1"
CONTENTS: Final = Contents(
    "stored tokens", (TOKENS, DESCRIPTION), lambda directory: has_value(directory / DESCRIPTION, "format", FORMAT)
)
_ABSENT = "absent"
_AGAIN = "copy it again, or compute the tokens again"


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of the images at positions [0, positions), opened for reading.

    One process opens them for itself: sending this object to another process would send the whole file.

    Attributes:
        vocab_size: tokens are in [0, vocab_size).
        positions: the number of images.
        epochs: the number of images, in epochs of the data set.
    """

    directory: Path
    vocab_size: int
    positions: int
    epochs: float
    _tokens: np.ndarray = field(repr=False, compare=False)

    @property
    def patches(self) -> int:
        """The number of tokens of an image."""
        return self._tokens.shape[1]

    @classmethod
    def open(cls, directory: Path, contract: Mapping[str, Any], *, digest: bool = False) -> "StoredTokens":
        """Opens what `write_tokens` wrote.

        Args:
            contract: what the tokens must have been computed from, from `token_contract`.
            digest: also read the whole file and compare its digest. Sizes are always compared.

        Raises:
            BeitJaxError: there are no tokens; they were computed from something else, which the error names; or a file
                is damaged.
        """
        path = directory / TOKENS
        read = _description(directory)
        stored, expected = read.typed("contract", dict, None), _as_stored(contract)
        _check_contract(directory, stored, expected)
        vocab_size, *shape = (read.typed(name, int, None) for name in ("vocab_size", "positions", "patches"))
        if min(vocab_size, *shape) < 1:
            raise BeitJaxError(f"{directory / DESCRIPTION}: expected positive numbers, found {[vocab_size, *shape]}")
        tokens = _mapped(path, (shape[0], shape[1]), _dtype(vocab_size))
        if digest and _file_digest(path) != read.typed("sha256", str, None):
            raise BeitJaxError(f"{path}: not what was written, by its digest; {_AGAIN}")
        return cls(directory, vocab_size, shape[0], shape[0] / expected["data"]["records"], tokens)

    def at(self, positions: Int[np.ndarray, " n"]) -> Int32[np.ndarray, "n patches"]:
        """The tokens of the images at these positions, int32.

        Raises:
            BeitJaxError: a position is beyond the stored ones, or the file is damaged.
            IndexError: a position is negative.
        """
        if positions.min(initial=0) < 0:
            raise IndexError(positions)
        last = int(positions.max(initial=0))
        if last >= self.positions:
            raise BeitJaxError(
                f"{self.directory}: tokens of {self.positions:,} images ({self.epochs:g} epochs) are stored, image "
                f"{last:,} of the run has none; store those of more epochs, or train for fewer"
            )
        tokens = self._tokens[positions]
        if tokens.max(initial=0) >= self.vocab_size:
            raise BeitJaxError(
                f"{self.directory / TOKENS}: expected tokens below {self.vocab_size}, found {tokens.max()}; {_AGAIN}"
            )
        return tokens.astype(np.int32)


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer's checkpoint: the configuration, a dataclass with a ``model_type``, and parameters by flat name."""

    @property
    def config(self) -> Any: ...

    @property
    def params(self) -> Mapping[str, np.ndarray]: ...


def token_contract(
    data: Mapping[str, Any], seed: int, views: ViewsTransform, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
    """Everything that decides the tokens of a position, for JSON. Masks, batches and hosts are not in it.

    Args:
        data: the contract of the data set, `datasets.Records.contract`.
        dtype: the type that the tokenizer computes in.
    """
    options = views.options
    shared = views.token_size is None  # the tokenizer then sees the student's view
    return {
        "data": dict(data),
        "seed": seed,
        "view": {
            "size": views.size if views.token_size is None else views.token_size,
            "interpolation": options.interpolation if shared else views.token_interpolation,
            "crop_scale": options.crop_scale,
            "crop_ratio": options.crop_ratio,
            "flip": options.flip,
            "color_jitter": options.color_jitter,
        },
        "tokenizer": {
            "model_type": tokenizer.config.model_type,
            **dataclasses.asdict(tokenizer.config),
            "dtype": dtype,
            "weights": _weights_digest(tokenizer.params),
        },
    }


def write_tokens(
    directory: Path,
    batches: Iterable[Batch],
    tokens_of: Callable[[Batch], Int[np.ndarray, "b patches"]],
    contract: Mapping[str, Any],
    *,
    positions: int,
    patches: int,
    vocab_size: int,
    progress: Progress = no_progress,
    overwrite: bool = False,
) -> None:
    """Computes and writes the tokens of positions [0, positions); `directory` appears once they are whole.

    Args:
        batches: all images in the order of positions: those of a single host from step 0 on; read as far as needed.
        tokens_of: computes the tokens of a batch.
        contract: `token_contract`.

    Raises:
        BeitJaxError: the directory exists and is not to be replaced, or holds something else; the disk is full; batches
            or tokens are not as announced; what was written reads back differently.
    """
    if min(positions, patches) < 1:
        raise BeitJaxError(f"{directory}: expected tokens of at least one image, found {positions} images to store")
    check_destination(directory, overwrite=overwrite, contents=CONTENTS)
    dtype = _dtype(vocab_size)
    need_bytes = positions * patches * dtype.itemsize
    with new_directory(directory, overwrite=overwrite, contents=CONTENTS, need_bytes=need_bytes) as partial:
        with (partial / TOKENS).open("wb") as file, progress(positions) as advance:
            out = _Digesting(file)
            header = {"descr": dtype.str, "fortran_order": False, "shape": (positions, patches)}
            np.lib.format.write_array_header_1_0(out, header)
            missing = positions
            for batch in batches:
                tokens = np.asarray(tokens_of(batch))[:missing]
                _check_tokens(tokens, patches, vocab_size)
                out.write(tokens.astype(dtype).tobytes())
                advance(len(tokens))
                missing -= len(tokens)
                if not missing:
                    break
        if missing:
            raise BeitJaxError(f"{directory}: the images ended {missing:,} before the {positions:,} to be stored")
        content = {
            "format": FORMAT,
            "positions": positions,
            "patches": patches,
            "vocab_size": vocab_size,
            "sha256": out.sha256.hexdigest(),
            "contract": _as_stored(contract),
        }
        write_json(partial / DESCRIPTION, content)
        synchronise(partial)
        StoredTokens.open(partial, contract, digest=True)
    synchronise_entry(directory.parent)


class _Digesting:
    """A file for writing, with a digest of everything that was to be written."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self._file.write(data)


def _dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of the two that holds every token, little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _check_tokens(tokens: np.ndarray, patches: int, vocab_size: int) -> None:
    if tokens.ndim != 2 or tokens.shape[1] != patches or not np.issubdtype(tokens.dtype, np.integer):
        raise BeitJaxError(f"tokens: expected integers [b, {patches}], found {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise BeitJaxError(f"tokens: expected 0 to {vocab_size - 1}, found {tokens.min()} to {tokens.max()}")


def _description(directory: Path) -> Fields:
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BeitJaxError(f"{printable(directory)}: no stored tokens here (no {DESCRIPTION}); see beit-jax tokenize")
    read = Fields(read_json(path), printable(path))
    read.choice("format", (FORMAT,), None)
    return read


def _as_stored(contract: Mapping[str, Any]) -> dict[str, Any]:
    """The contract as JSON returns it: tuples become lists."""
    return json.loads(json.dumps(contract))


def _check_contract(directory: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    old, new = flatten(stored), flatten(expected)
    different = sorted(name for name in old.keys() | new.keys() if old.get(name, _ABSENT) != new.get(name, _ABSENT))
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more differences)" if len(different) > 1 else ""
        raise BeitJaxError(
            f"{printable(directory)}: computed with {printable(name)} {printable(old.get(name, _ABSENT))}, now it is "
            f"{printable(new.get(name, _ABSENT))}{more}; give what it was, or compute the tokens again"
        )


def _mapped(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """The array in a file. The file must hold nothing else."""
    try:
        size = path.stat().st_size
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, TokenError) as error:  # NumPy's parser of headers raises all three
        raise _damaged(path, shape, printable(error)) from error
    if (array.shape, array.dtype, array.flags.c_contiguous) != (shape, dtype, True):
        raise _damaged(path, shape, f"{array.dtype} {list(array.shape)}")
    if size != array.offset + array.nbytes:
        raise _damaged(path, shape, f"{size - array.offset - array.nbytes} bytes more")
    return array


def _damaged(path: Path, shape: tuple[int, int], found: str) -> BeitJaxError:
    return BeitJaxError(f"{printable(path)}: expected tokens {list(shape)} by {DESCRIPTION}, found {found}; {_AGAIN}")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_digest(params: Mapping[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(params):
        leaf = np.ascontiguousarray(params[name])
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
