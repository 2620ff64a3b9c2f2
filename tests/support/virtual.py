"""Processes with several virtual CPU devices."""

import os


def xla_flags(devices: int, *more: str) -> str:
    """Returns ``XLA_FLAGS`` for a process with so many devices, which compiles as this one does."""
    return " ".join([os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}", *more])
