"""A server on 127.0.0.1 for as long as a ``with`` block lasts, in threads that end with it."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

TIMEOUT = 5.0
"""Seconds without progress after which a connection is given up."""


class Handler(BaseHTTPRequestHandler):
    """One request per connection, so that no thread waits for a second one when the server stops.

    Attributes:
        hub: the server that it answers for, which keeps a log of its own.
    """

    hub: Any
    timeout = TIMEOUT

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the server's `requests` is the log."""


class Server:
    """A context manager.

    Args:
        handler: answers requests; its `hub` will be this server.

    Attributes:
        url: where it listens.
    """

    def __init__(self, handler: type[Handler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answering", (handler,), {"hub": self}))
        self._server.daemon_threads = False  # closing waits for them
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
