"""Addresses for processes that talk over loopback."""

import socket


def free_address() -> str:
    """HOST:PORT at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
