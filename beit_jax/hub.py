"""From the name of a model to its files on this machine: a local path, or a hub name by huggingface_hub's cache."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import read_json
from beit_jax.terminal import Bar

WEIGHTS, CONFIG, PROCESSOR = "flax_model.safetensors", "config.json", "preprocessor_config.json"
"""The files of a native checkpoint; a directory in Hugging Face format has the same two JSON files."""

ADAPTER_WEIGHTS = "flax_adapter.safetensors"
"""The factors of a native checkpoint that was trained with an adapter, in its directory."""

ADAPTER = "adapter_config.json"
"""peft's; a model with an adapter beside its weights is another model than the weights alone."""

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The weights of an adapter of peft's, in order of preference."""

# In order of preference. An index is followed by the shards that it lists.
WEIGHT_FILES = (
    WEIGHTS,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\:\0]+")
_NOWHERE = "no such file or directory, and not a hub name like microsoft/beit-base-patch16-224"
PATIENCE = 40.0
"""Seconds without an answer or a byte after which the hub counts as unreachable. huggingface_hub waits much longer."""

Reporting = Callable[[int, str], Bar]  # called with the bytes that are expected, 0 if unknown, and with what is done


@dataclass(frozen=True)
class Source:
    """The files of a model on this machine.

    Attributes:
        path: a directory, or one weight file whose directory holds the JSON files.
        name: the name that the user gave.
        revision: the commit of a hub model; None for local files.
    """

    path: Path
    name: str
    revision: str | None = None

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def as_source(source: "Source | str | Path") -> "Source":
    """The source itself, or what `resolve` finds by a name."""
    return source if isinstance(source, Source) else resolve(source)


def recorded_sha256(file: Path) -> str | None:
    """The SHA-256 of a large file in the hub's cache, which stores it under its digest; None for other files."""
    name = file.resolve().name
    return name if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", name) else None


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Reporting | None = None,
) -> Source:
    """Finds the local directory or file `name`, or downloads the hub model `name` as far as the cache lacks it.

    Offline mode, tokens, endpoint and the default cache are huggingface_hub's (HF_HUB_OFFLINE, HF_TOKEN, HF_HOME...).
    A file appears in the cache when it is complete. All files of a call are of one commit, even if the branch moves
    meanwhile.

    Args:
        revision: branch, tag or commit of a hub model; "main" by default.
        progress: shows what is asked and downloaded, in the place of huggingface_hub's bars.

    Raises:
        BeitJaxError: the name is neither a path nor a hub name; the model, the revision or the weights do not exist or
            may not be read; the cache lacks files and the hub does not give them; the cache cannot be written.
    """
    text = str(name)
    path = os.path.expanduser(text)  # Path's raises an exception for an unknown user
    if os.path.exists(path):  # Path's raises an exception for a name that the system refuses
        if revision is not None:
            raise BeitJaxError(f"{printable(text)}: a revision was given, but this is a local path; leave it out")
        return Source(Path(path), text)
    if not _HUB_NAME.fullmatch(text) or text.startswith((".", "-")):
        raise BeitJaxError(f"{printable(text)}: {_NOWHERE}")
    if revision == "":
        raise BeitJaxError(f"{text}: the revision is empty; give a branch, tag or commit, or leave it out")
    return _download(text, revision, cache_dir, progress)


def _download(name: str, revision: str | None, cache_dir: str | Path | None, progress: Reporting | None) -> Source:
    model = _HubModel(name, revision, cache_dir, progress)
    config = model.fetch(CONFIG)
    if config is None:
        adapter = model.fetch(ADAPTER)
        if adapter is not None:
            return model.adapter(adapter)
        raise BeitJaxError(f"{model}: holds no {CONFIG}; expected a model in Hugging Face format, or a native one")
    model.commit = config.parent.name  # the directory of a snapshot has the name of its commit
    model.fetch(PROCESSOR)
    whole = model.has_weights
    for file in model.weight_files():
        found = model.fetch(file, called="weights")
        if found is None:
            continue
        for shard in _shards(found) if file.endswith(".index.json") else ():
            if model.fetch(shard) is None:
                raise BeitJaxError(f"{model}: {file} lists {printable(shard)}, which the hub does not have")
        if not whole:  # a model that is whole in the cache needs no network
            model.fetch(ADAPTER)  # where there is one, the reader refuses the directory
        return Source(config.parent, name, model.commit)
    adapter = model.fetch(ADAPTER)
    if adapter is not None:
        return model.adapter(adapter)
    raise BeitJaxError(f"{model}: holds none of {', '.join(WEIGHT_FILES)}; choose a model with PyTorch weights")


class _HubModel:
    """One model at one revision, through huggingface_hub's cache.

    huggingface_hub is imported where it is used, because with its HTTP client it takes longer to import than all that
    a local run needs.

    Attributes:
        commit: None until the first file is there; all further files are taken from this commit.
    """

    def __init__(
        self, name: str, revision: str | None, cache_dir: str | Path | None, progress: Reporting | None
    ) -> None:
        self.name, self.revision, self._progress = name, revision, progress
        self.cache_dir = None if cache_dir is None else os.path.expanduser(cache_dir)
        self.commit: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at revision {printable(self.revision)}"

    def fetch(self, file: str, *, called: str | None = None) -> Path | None:
        """Returns `file` from the cache or the hub; None if the hub says, or has said, that there is no such file.

        Args:
            called: what the file is, for messages; by default its name.

        Raises:
            BeitJaxError: any other failure. A missing answer never counts as "no such file".
        """
        from huggingface_hub import errors, hf_hub_download

        revision = self.commit or self.revision
        try:
            if self.commit and self._is_known_absent(file):
                return None
            with _quietly(), _Patience(self._progress, file) as patience:
                options: dict[str, Any] = {} if self._progress is None else {"tqdm_class": patience.bar}
                return Path(hf_hub_download(self.name, file, revision=revision, cache_dir=self.cache_dir, **options))
        except errors.RemoteEntryNotFoundError:
            return None
        except Exception as error:  # errors of huggingface_hub, its HTTP client and hf_xet have no common base class
            raise BeitJaxError(f"{self}: {_reason(error, called or printable(file))}") from error

    def adapter(self, config: Path) -> Source:
        """The adapter that the model on the hub is, without a model: its reader asks for the base.

        Raises:
            BeitJaxError: as `fetch`; it has no weights.
        """
        self.commit = config.parent.name
        self.fetch(CONFIG)  # of the adapted model, if it is there: it says its labels
        if not any(self.fetch(file, called="weights") for file in PEFT_WEIGHTS):
            raise BeitJaxError(f"{self}: holds an adapter without weights ({' or '.join(PEFT_WEIGHTS)})")
        return Source(config.parent, self.name, self.commit)

    def weight_files(self) -> tuple[str, ...]:
        """`WEIGHT_FILES`; in offline mode only those in the cache, because the hub cannot be asked for the others."""
        from huggingface_hub import constants

        cached = tuple(file for file in WEIGHT_FILES if isinstance(self._look_up(file), str))
        return cached if constants.HF_HUB_OFFLINE and cached else WEIGHT_FILES

    @property
    def has_weights(self) -> bool:
        """True if the cache holds weights of the commit."""
        return any(isinstance(self._look_up(file), str) for file in WEIGHT_FILES)

    def _is_known_absent(self, file: str) -> bool:
        """True if the cache has recorded the hub's answer that the commit has no such file."""
        from huggingface_hub import _CACHED_NO_EXIST

        return self._look_up(file) is _CACHED_NO_EXIST

    def _look_up(self, file: str) -> object:
        from huggingface_hub import try_to_load_from_cache

        return try_to_load_from_cache(self.name, file, revision=self.commit, cache_dir=self.cache_dir)


class _Patience:
    """Ends a download in which the hub is silent for `PATIENCE` seconds, and shows what is waited for.

    huggingface_hub gives a request up to 60 seconds, and repeats it five times. A request is sent with no more than the
    time that is left, and not at all when none is.
    """

    def __init__(self, progress: Reporting | None, file: str) -> None:
        self._progress, self._file = progress, file
        self._shown = ExitStack()

    def __enter__(self) -> Self:
        from huggingface_hub import get_session

        self._show(0, f"asking the hub for {self._file}")
        self._alive()
        self._hooks = get_session().event_hooks
        self._hooks["request"].append(self._limit)
        self._hooks["response"].append(self._alive)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks["request"].remove(self._limit)
        self._hooks["response"].remove(self._alive)
        self._shown.close()

    def bar(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> "_ByteBar":
        """What huggingface_hub makes when a download begins, in the place of a tqdm bar."""
        return _ByteBar(self._show(total or 0, f"downloading {self._file}"), initial, self._alive)

    def _show(self, total: int, what: str) -> Callable[[int], None]:
        self._shown.close()
        return (lambda done: None) if self._progress is None else self._shown.enter_context(self._progress(total, what))

    def _alive(self, response: object = None) -> None:
        self._deadline = time.monotonic() + PATIENCE

    def _limit(self, request: Any) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer for {PATIENCE:.0f} seconds")
        usual = request.extensions.get("timeout", {})
        limited = {kind: min(left, usual.get(kind) or left) for kind in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": limited}


class _ByteBar:
    """As much of tqdm as huggingface_hub uses."""

    def __init__(self, advance: Callable[[int], None], initial: int, alive: Callable[[], None]) -> None:
        self._advance, self._alive = advance, alive
        advance(initial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, done: float = 1) -> None:
        self._alive()
        self._advance(int(done))

    def close(self) -> None:
        pass


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what huggingface_hub says about its retries from standard error, unless its environment asks for it."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    if "HF_HUB_VERBOSITY" not in os.environ and "HF_DEBUG" not in os.environ:
        hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _shards(index: Path) -> list[str]:
    """The shards that an index lists. Names that are no plain file names are left out; the reader refuses them."""
    weight_map = read_json(index).get("weight_map")
    listed = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in listed if isinstance(name, str) and _FILE_NAME.fullmatch(name)})


def _reason(error: Exception, file: str) -> str:
    """Says in one line why a file could not be fetched."""
    from huggingface_hub import errors

    unanswered = isinstance(error, errors.LocalEntryNotFoundError | TimeoutError)
    cause = error.__cause__ if unanswered and error.__cause__ else error
    match cause:
        case errors.OfflineModeIsEnabled():
            return (
                f"no such path, the cache lacks its {file}, and offline mode is on (HF_HUB_OFFLINE); "
                "download it once with a network, or give a local directory"
            )
        case errors.HFValidationError():
            return _NOWHERE
        case errors.GatedRepoError():
            return "access is restricted; accept its terms on the hub and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return "no such path and no such model on the hub (or it is private: set HF_TOKEN)"
        case errors.RevisionNotFoundError():
            return "no such revision; see the model's page for its branches, tags and commits"
        case errors.HfHubHTTPError():
            return _answered(cause.response.status_code, cause.response.reason_phrase)
        case OSError() if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk of the cache is full; free space, or choose another cache directory"
        case OSError() if cause.errno:
            return f"the cache cannot be used ({_one_line(cause)}); choose another cache directory"
    text = _one_line(cause)
    if unanswered:
        return (
            f"no such path, the cache lacks its {file}, and the hub cannot be reached ({text}); "
            "check the network, or give a local directory"
        )
    return f"the download of its {file} failed ({text}); nothing incomplete was kept, run again"


def _one_line(error: BaseException) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()), 400)


def _answered(status: int, phrase: str) -> str:
    advice = {401: "check HF_TOKEN", 403: "check what HF_TOKEN may read", 429: "wait a while and run again"}
    return f"the hub answered {status} {printable(phrase)}; {advice.get(status, 'run again later')}"
