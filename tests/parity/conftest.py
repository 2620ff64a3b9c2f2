"""A model of the reference, converted through real files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

from beit_jax.convert import load
from beit_jax.hub import resolve
from beit_jax.models.build import Model, build_model
from beit_jax.tree import unflatten


def pytest_itemcollected(item: pytest.Item) -> None:
    """Longer cases are compiled as users compile: `.ci/run` runs them with the tests that are marked so."""
    if item.get_closest_marker("thorough"):
        item.add_marker("compiled")


def _converted(model: torch.nn.Module, directory: Path, **options: Any) -> Model:
    reference.save(model, directory)
    checkpoint = load(resolve(directory))
    return build_model(checkpoint.config, unflatten(dict(checkpoint.params)), **options)


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Model]:
    """Saves a reference model as a Hugging Face directory and reads it back as ours."""
    return partial(_converted, directory=tmp_path / "reference")


@pytest.fixture(scope="session")
def converted_at() -> Callable[..., Model]:
    """The same of a model and a directory."""
    return _converted
