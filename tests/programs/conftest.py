"""Fixtures of programs: symbolic sizes, and native checkpoints of every kind."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
from tiny_models import KINDS, checkpoint

from beit_jax.weights.native import save


@pytest.fixture(scope="package", autouse=True)
def unchecked() -> Iterator[None]:
    """Annotations say that sizes are integers; a symbolic size behaves like one, and is none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def native(tmp_path: Path) -> Callable[..., Path]:
    """Writes the native checkpoint of a kind, and returns its directory."""

    def write(kind: str = "classification", seed: int = 0) -> Path:
        directory = tmp_path / f"{kind} {seed}"
        directory.mkdir()
        save(directory, checkpoint(KINDS[kind], seed))
        return directory

    return write
