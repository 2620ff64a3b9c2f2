"""An export becomes a repository of the Hugging Face hub.

All that can be refused is refused before anything is computed or uploaded: no token, no network, a repository that
holds something else. The upload is one commit: a repository never holds half of an export.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from beit_jax.errors import BeitJaxError, printable
from beit_jax.publishing.options import PushOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD: Final = "README.md"
_OURS: Final = (".gitattributes",)  # which the hub puts into a new repository


@dataclass(frozen=True)
class Upload:
    """A repository that may be written to.

    Attributes:
        repository: OWNER/NAME.
        holds: the files in it; None if it does not exist yet.
    """

    repository: str
    private: bool
    holds: tuple[str, ...] | None
    api: "HfApi"

    def files(self, directory: Path) -> list[tuple[str, int]]:
        """What would be uploaded of a directory: names and sizes in bytes, sorted by name. Hidden files stay here."""
        found = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
        return [(path.name, path.stat().st_size) for path in found]

    def send(self, directory: Path, message: str) -> str:
        """Makes the repository, if there is none, and uploads the files of a directory as one commit.

        Returns:
            The address of the commit.

        Raises:
            BeitJaxError: the hub refuses it or cannot be reached. The directory stays as it is.
        """
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, directory / name) for name, _ in self.files(directory)]
        with _explained(self.repository, f"nothing was uploaded, and {printable(directory)} is whole"):
            if self.holds is None:
                self.api.create_repo(self.repository, private=self.private, repo_type="model")
            done: Any = self.api.create_commit(self.repository, operations, commit_message=message)
        return str(done.commit_url)


def prepare(options: PushOptions) -> Upload | None:
    """Asks the hub whether the upload is possible; None if none was asked for.

    Raises:
        BeitJaxError: no token or a wrong one, no network, or a repository that holds something else.
    """
    options.check()
    if options.push is None:
        return None
    from huggingface_hub import HfApi, constants, errors, get_token

    if constants.HF_HUB_OFFLINE:
        raise BeitJaxError(f"--push {options.push}: offline mode is on (HF_HUB_OFFLINE); unset it, or leave --push out")
    token = get_token()
    if token is None:
        raise BeitJaxError(f"--push {options.push}: no token for the hub; run hf auth login, or set HF_TOKEN")
    api = HfApi(token=token, library_name="beit-jax")
    with _explained(options.push, "nothing was uploaded"):
        api.whoami()
        try:
            found = api.model_info(options.push)
            holds = tuple(sorted(each.rfilename for each in found.siblings or ()))
        except errors.RepositoryNotFoundError:
            holds = None
    others = [name for name in holds or () if name not in _OURS]
    if others and not options.into_existing:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise BeitJaxError(
            f"--push {options.push}: exists and holds {printable(others[0])}{more}; choose another name, or give "
            "--into-existing to replace files of the same names and keep the others"
        )
    if holds is not None and options.private and not found.private:
        raise BeitJaxError(
            f"--push {options.push}: exists and is public, which --private does not change; make it private on its "
            "page, or leave --private out"
        )
    return Upload(options.push, options.private, holds, api)


@contextmanager
def _explained(repository: str, left: str) -> Iterator[None]:
    """Says in one line what the hub answered, and what is left as it was."""
    from huggingface_hub import errors

    try:
        yield
    except BeitJaxError:
        raise
    except errors.HfHubHTTPError as error:
        status, said = error.response.status_code, printable(" ".join(str(error.server_message or "").split()), 200)
        advice = _ADVICE.get(status, "run again later")
        about = f" ({said})" if said else ""
        raise BeitJaxError(f"--push {repository}: the hub answered {status}{about}; {left}; {advice}") from error
    except Exception as error:  # errors of huggingface_hub, its HTTP client and hf_xet have no common base class
        said = printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        raise BeitJaxError(
            f"--push {repository}: the hub cannot be reached ({said}); {left}; check the network and run again"
        ) from error


_ADVICE = {
    401: "the token is not valid: run hf auth login, or set HF_TOKEN",
    403: "the token may not write there: make one that may, or choose your own name as OWNER",
    404: "check the name of the owner",
    429: "wait a while and run again",
}


def listing(upload: Upload, directory: Path, *, own_card: bool = False) -> list[str]:
    """Lines that show what `Upload.send` would upload, with sizes, and what it would replace.

    Args:
        own_card: a person wrote the model card in the directory.
    """
    files = upload.files(directory)
    width = max(len(printable(name)) for name, _ in files)
    where = "a new private" if upload.private else "a new public"
    lines = [f"to {upload.repository}, {where if upload.holds is None else 'an existing'} repository:"]
    for name, size in files:
        replaced = "  replaces a file of this name" if name in (upload.holds or ()) else ""
        yours = "  as you wrote it" if own_card and name == CARD else ""
        lines.append(f"  {printable(name).ljust(width)}  {size:>15,} bytes{replaced}{yours}")
    return [*lines, f"  {'in all'.ljust(width)}  {sum(size for _, size in files):>15,} bytes"]
