"""The hub's side of an upload on 127.0.0.1, as much of it as `HfApi` needs: who asks, what is there, create, commit.

Files are taken as the hub takes small ones: within the commit, in base64.
"""

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from server import Handler, Server

TOKEN = "hf_test"


@dataclass
class Repository:
    """Its files by name."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False


class FakeUploads(Server):
    """The server.

    Attributes:
        repositories: by OWNER/NAME.
        requests: method and path of everything that was asked, in order.
        refusals: by the beginning of a path, the status that is answered instead.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refusals: dict[str, int] = {}
        super().__init__(_Handler)

    def written(self) -> list[str]:
        """The requests that would change something."""
        return [request for request in self.requests if request.startswith("POST")]


class _Handler(Handler):
    hub: FakeUploads

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        refusal = next((status for start, status in self.hub.refusals.items() if path.startswith(start)), None)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
        elif refusal is not None:
            self.send(refusal, {"error": "no"})
        elif path == "/api/whoami-v2":
            self.send(200, {"name": "someone", "type": "user"})
        elif path == "/api/validate-yaml":  # of the model card
            self.send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("private") is True or asked.get("visibility") == "private"
            owner = f"{asked['organization']}/" if asked.get("organization") else "someone/"
            name = asked["name"] if "/" in asked["name"] else owner + asked["name"]
            self.hub.repositories[name] = Repository({".gitattributes": b""}, private)
            self.send(200, {"url": f"{self.hub.url}/{name}"})
        else:
            self.repository(*path.removeprefix("/api/models/").split("/", 3), body=body)

    def repository(self, owner: str, name: str, action: str = "", rest: str = "", *, body: bytes) -> None:
        found = self.hub.repositories.get(f"{owner}/{name}")
        if found is None:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.send(200, {"files": files})
        elif action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    found.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.send(
                200,
                {"success": True, "commitOid": "c0ffee", "commitUrl": f"{self.hub.url}/{owner}/{name}/commit/c0ffee"},
            )
        else:
            siblings = [{"rfilename": file} for file in found.files]
            self.send(200, {"id": f"{owner}/{name}", "private": found.private, "siblings": siblings})

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
