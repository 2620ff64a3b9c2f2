"""A Hugging Face hub on 127.0.0.1, as much of it as `hf_hub_download` needs, with failures on request.

Answers HEAD and GET of ``/{model}/resolve/{revision}/{file}`` with the headers and error codes of huggingface.co, whole
or from an offset on.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http
from server import Handler, Server

MAX_REQUESTS = 200

_PATH = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-")
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Request:
    """What a client asked for. `start`: the offset from which on it wants the file."""

    method: str
    model: str
    revision: str
    file: str
    start: int = 0


@dataclass(frozen=True)
class Answer:
    """Instead of the file: a status, and the headers by which huggingface.co tells one refusal from another."""

    status: int
    code: str | None = None
    message: str | None = None


NO_MODEL = Answer(404, "RepoNotFound", "Repository not found")
UNAUTHORISED = Answer(401, "RepoNotFound", "Invalid username or password.")
BAD_TOKEN = Answer(401, None, "Invalid credentials in Authorization header")
GATED = Answer(403, "GatedRepo", "Access to this model is restricted and you are not in the authorized list.")
NO_REVISION = Answer(404, "RevisionNotFound", "Invalid rev id")
NO_FILE = Answer(404, "EntryNotFound", "Entry not found")
NOT_A_HUB = Answer(200)
HANG_UP = Answer(0)
"""No answer at all: the connection is closed."""


@dataclass
class Model:
    """Commits by their hash, and which one every branch points to."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


class FakeHub(Server):
    """The server.

    Attributes:
        url: what HF_ENDPOINT is to be.
        requests: everything that was asked, in order.
        refusals: by model, or by (model, file): what is answered instead.
        cuts: by file, how many bytes of it any connection delivers up to before it breaks.
        before: called with every request before it is answered.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.requests: list[Request] = []
        self.refusals: dict[str | tuple[str, str], Answer] = {}
        self.cuts: dict[str, int] = {}
        self.before: Callable[[Request], object] = lambda request: None
        super().__init__(_Handler)

    def push(self, name: str, files: Files, *, branch: str = "main") -> str:
        """A new commit of a model, to which the branch now points. Returns its hash."""
        model = self.models.setdefault(name, Model())
        content = b"".join(path.encode() + files[path] for path in sorted(files))
        commit = hashlib.sha1(b"%d" % len(model.commits) + content).hexdigest()
        model.commits[commit] = dict(files)
        model.branches[branch] = commit
        return commit

    def asked(self, method: str = "GET") -> list[str]:
        """The files of the requests so far."""
        return [request.file for request in self.requests if request.method == method]

    def answer(self, request: Request) -> tuple[str | None, bytes | Answer]:
        """The commit, if there is one, and the content, or why there is none."""
        self.before(request)
        refusal = self.refusals.get(request.model) or self.refusals.get((request.model, request.file))
        model = self.models.get(request.model)
        if refusal is not None or model is None:
            return None, refusal or NO_MODEL
        commit = model.branches.get(request.revision, request.revision)
        if commit not in model.commits:
            return None, NO_REVISION
        return commit, model.commits[commit].get(request.file, NO_FILE)


def use(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points huggingface_hub, imported already or not, to the hub at `url` and to an empty cache.

    It reads its environment variables once, on import, hence the constants. It is left without a token, telemetry and
    the Xet protocol, and does not sleep between its retries.
    """
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the next request makes a client under these settings


def environment(url: str, cache: Path) -> dict[str, str]:
    """The same for a process of its own: its environment variables."""
    ours = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache.parent),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | ours


class _Handler(Handler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def serve(self) -> None:
        found = _PATH.fullmatch(self.path)
        if found is None or len(self.hub.requests) >= MAX_REQUESTS:
            self.send_error(404 if found is None else 429)
            return
        start = _RANGE.fullmatch(self.headers.get("Range", ""))
        model, revision, file = map(unquote, found.groups())
        request = Request(self.command, model, revision, file, int(start[1]) if start else 0)
        self.hub.requests.append(request)
        commit, content = self.hub.answer(request)
        if isinstance(content, Answer):
            self.refuse(commit, content)
        else:
            self.deliver(commit, content, request)

    def refuse(self, commit: str | None, answer: Answer) -> None:
        if answer is HANG_UP:
            return
        self.send_response(answer.status)
        headers = {"X-Repo-Commit": commit, "X-Error-Code": answer.code, "X-Error-Message": answer.message}
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def deliver(self, commit: str | None, content: bytes, request: Request) -> None:
        self.send_response(206 if request.start else 200)
        self.send_header("X-Repo-Commit", str(commit))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - request.start))
        if request.start:
            self.send_header("Content-Range", f"bytes {request.start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[request.start : self.hub.cuts.get(request.file)])
