"""Kernels on meshes of eight virtual devices: each has the gradients of one device, which computes no kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from virtual import xla_flags

SCRIPT = Path(__file__).parents[1] / "support" / "sharded_kernels.py"


@pytest.mark.thorough
def test_every_mesh_has_the_gradients_of_one_device() -> None:
    environment = {**os.environ, "XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    found = json.loads(subprocess.run([sys.executable, SCRIPT], env=environment, stdout=-1, check=True).stdout)
    for name, mesh in found.items():
        # The way there, again on the way back, and the way back; a batch that devices cannot share is the textbook's.
        assert mesh["kernels"] == (0 if name == "8x1x1x4" else 3), name
        assert mesh["apart"] and max(mesh["apart"].values()) <= 1e-5, name
