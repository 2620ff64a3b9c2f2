"""A model's name to a local directory: a path as it is, a Hugging Face name through huggingface_hub's cache."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.weights import CONFIG, PROCESSOR, WEIGHTS

# In order of preference; an index stands for the shards it lists.
WEIGHT_FILES = (
    WEIGHTS,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Where a model lies on this machine.

    Attributes:
        path: a directory, or one weight file whose directory holds the JSON files.
        name: what the user called it.
        revision: the commit that a hub name resolved to; None for local files.
    """

    path: Path
    name: str
    revision: str | None = None

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def resolve(name: str | Path, *, revision: str | None = None, cache_dir: Path | None = None) -> Source:
    """The local directory or file `name`, or the files of the hub model `name`, downloaded where the cache lacks them.

    Offline mode, tokens, endpoint and the default cache are huggingface_hub's (HF_HUB_OFFLINE, HF_TOKEN, HF_HOME...).

    Args:
        revision: branch, tag or commit of a hub model; "main" by default.

    Raises:
        BeitJaxError: no such path, and not a hub name; no network; no such model, revision or weights; no access.
    """
    text = str(name)
    path = Path(text).expanduser()
    if path.exists():
        if revision is not None:
            raise BeitJaxError(f"{printable(text)}: a revision was given, but this is a local path")
        return Source(path, text)
    if not _HUB_NAME.fullmatch(text) or text.startswith((".", "-")):
        raise BeitJaxError(
            f"{printable(text)}: no such file or directory, and not a hub name like microsoft/beit-base-patch16-224"
        )
    return _download(text, revision, cache_dir)


def _download(name: str, revision: str | None, cache_dir: Path | None) -> Source:
    # Imported here: with its HTTP client it costs more than everything a local run needs.
    from huggingface_hub import errors, hf_hub_download

    at = f" at revision {printable(revision)}" if revision else ""

    def fetch(file: str, commit: str | None) -> Path:
        return Path(hf_hub_download(name, file, revision=commit, cache_dir=cache_dir))

    try:
        config = fetch(CONFIG, revision)
        commit = config.parent.name  # a snapshot's directory is its commit: all files come from the same one
        _fetch_if_there(fetch, PROCESSOR, commit)
        for file in WEIGHT_FILES:
            found = _fetch_if_there(fetch, file, commit)
            if found is None:
                continue
            for shard in _shards(found) if file.endswith(".index.json") else ():
                fetch(shard, commit)
            return Source(config.parent, name, commit)
    except errors.GatedRepoError:
        raise BeitJaxError(f"{name}: access is restricted; accept its terms on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise BeitJaxError(
            f"{name}: no such path and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise BeitJaxError(f"{name}: no such revision{at}; see the model's page for its branches and commits") from None
    except errors.LocalEntryNotFoundError:
        raise BeitJaxError(
            f"{name}{at}: not in the cache, and the hub cannot be reached (no network, or offline mode); "
            "download it where there is a network, or give a local directory"
        ) from None
    except errors.EntryNotFoundError as error:
        raise BeitJaxError(f"{name}{at}: a file is missing on the hub: {_one_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise BeitJaxError(f"{name}{at}: the hub answered: {_one_line(error)}") from None
    except OSError as error:
        raise BeitJaxError(f"{name}{at}: the download failed: {_one_line(error)}") from None
    raise BeitJaxError(f"{name}{at}: holds none of {', '.join(WEIGHT_FILES)}")


def _fetch_if_there(fetch, file: str, commit: str) -> Path | None:  # type: ignore[no-untyped-def]
    from huggingface_hub import errors

    try:
        return fetch(file, commit)  # type: ignore[no-any-return]
    except errors.LocalEntryNotFoundError:
        # Offline, a file that the model does not have and one that was never downloaded look the same.
        return None
    except errors.EntryNotFoundError:
        return None


def _shards(index: Path) -> list[str]:
    """File names an index lists; which of them may be opened is decided when the checkpoint is read."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in listed if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)})
    except (ValueError, KeyError, AttributeError):
        return []  # the reader of the index says what is wrong with it


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()), 200)
