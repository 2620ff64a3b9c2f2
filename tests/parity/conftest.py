"""A model of the reference, converted through real files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

from beit_jax.convert import load
from beit_jax.hub import resolve
from beit_jax.models.build import Model, build_model
from beit_jax.tree import unflatten


@pytest.fixture
def converted(tmp_path: Path) -> Callable[[torch.nn.Module], Model]:
    """Saves a reference model as a Hugging Face directory and reads it back as ours."""

    def convert(model: torch.nn.Module, **options: Any) -> Model:
        reference.save(model, tmp_path / "reference")
        checkpoint = load(resolve(tmp_path / "reference"))
        return build_model(checkpoint.config, unflatten(dict(checkpoint.params)), **options)

    return convert
