"""What `train`, `tokenize` and `reconstruct` read besides data and models, given as people have it, and converted.

`beit_jax.train` reads native checkpoints only, so that it needs no converter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import Source, resolve
from beit_jax.terminal import byte_progress, say
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, read_tokenizer
from beit_jax.tokenizers.configs import is_native_tokenizer
from beit_jax.train.loop.contract import RUN
from beit_jax.weights.native import NativeCheckpoint, is_native, load

RESULTS = {"init": ("model",), "teacher": ("model",), "tokenizer": ("tokenizer",), "decoder": ("decoder",)}
"""By option: the results of a run that it can be, by the names of their directories."""


def model(option: str, name: str) -> NativeCheckpoint:
    """The model that an option names, converted in memory if it is not native.

    Args:
        option: "init" or "teacher".
        name: a native directory, a run's directory, a hub name, or what `beit-jax convert` reads.

    Raises:
        BeitJaxError: nothing there can be read, or it is a tokenizer.
    """
    with _naming(option):
        return _model(_in_run(resolve(name, progress=byte_progress), RESULTS[option]))


def tokenizer(option: str, name: str) -> TokenizerCheckpoint:
    """The tokenizer that an option names, or the decoder of one, converted in memory if it is not native.

    Args:
        option: "tokenizer" or "decoder".
        name: as in `model`.

    Raises:
        BeitJaxError: nothing there can be read, or it is a model.
    """
    with _naming(option):
        return _tokenizer(_in_run(resolve(name, progress=byte_progress), RESULTS[option]))


READERS: Mapping[str, Callable[[str, str], NativeCheckpoint | TokenizerCheckpoint]] = {
    "init": model,
    "teacher": model,
    "tokenizer": tokenizer,
    "decoder": tokenizer,
}


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Says which option an error is about."""
    try:
        yield
    except BeitJaxError as error:
        raise BeitJaxError(f"--{option}: {error}") from None


def _in_run(source: Source, results: Sequence[str]) -> Source:
    """The result in a run's directory, or the source itself if it is no run's directory."""
    if not (source.path / RUN).is_file():
        return source
    for result in results:
        if (source.path / result).is_dir():
            say(f"{printable(source.path)}: a run, of which {result}/ is taken")
            return Source(source.path / result, source.name)
    found = sorted(path.name for path in source.path.iterdir() if path.is_dir() and is_native(path))
    what = f"its results are {', '.join(found)}" if found else "it has no results before its end; let it go on"
    raise BeitJaxError(f"{printable(source.path)}: a run without {results[0]}/; {what}")


def _model(source: Source) -> NativeCheckpoint:
    from beit_jax.convert import importer, tokenizers

    if source.path.is_dir() and is_native(source.path):
        if is_native_tokenizer(source.path):
            raise BeitJaxError(f"{printable(source.path)}: a tokenizer; expected a model")
        return load(source.path)
    if tokenizers.is_tokenizer(source):
        raise BeitJaxError(f"{printable(source.name)}: a tokenizer; expected a model")
    return importer.load(source)


def _tokenizer(source: Source) -> TokenizerCheckpoint:
    from beit_jax.convert import tokenizers

    native = source.path.is_dir() and is_native(source.path)
    if not (is_native_tokenizer(source.path) if native else tokenizers.is_tokenizer(source)):
        raise BeitJaxError(
            f"{printable(source.name)}: a model; expected a tokenizer: DALL-E's encoder.pkl, a VQ-KD file of BEiT v2, "
            "what beit-jax convert makes of them, or a run that trained one"
        )
    return read_tokenizer(source.path) if native else tokenizers.load(source)
