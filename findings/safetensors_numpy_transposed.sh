#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file writes a transposed array in the wrong order.
#
# The writer takes an array's memory as it lies and its shape as it is: of x.T the file holds x's bytes under x.T's
# shape, other numbers in the same places, and no error. safetensors.torch refuses such tensors by name, and
# safetensors.flax takes jax arrays rightly; but a NumPy view given to safetensors.flax is written wrong as well.
# Turning [in, out] kernels into PyTorch's [out, in] is a transposition, the very thing an exporter does, and a square
# matrix passes each check of shapes.
# Seen:
#   safetensors.numpy, contiguous copy: first row [0.0, 3.0, 6.0] reads back as [0.0, 3.0, 6.0]
#   safetensors.numpy, transposed view: first row [0.0, 3.0, 6.0] reads back as [0.0, 1.0, 2.0]
#   safetensors.flax, jax array transposed: first row [0.0, 3.0, 6.0] reads back as [0.0, 3.0, 6.0]
#   safetensors.flax, transposed view: first row [0.0, 3.0, 6.0] reads back as [0.0, 1.0, 2.0]
# Touched: whoever exports Flax kernels to PyTorch; beit-jax makes every array contiguous before it is written.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.5.5 jax==0.12.0.1 \
    jaxlib==0.12.0.1 flax==0.12.12
cd "$folder"
venv/bin/python - <<'END'
import sys

import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy

kernel = np.arange(9, dtype=np.float32).reshape(3, 3)
cases = {
    "safetensors.numpy, contiguous copy": (safetensors.numpy, np.ascontiguousarray(kernel.T)),
    "safetensors.numpy, transposed view": (safetensors.numpy, kernel.T),
    "safetensors.flax, jax array transposed": (safetensors.flax, jnp.asarray(kernel).T),
    "safetensors.flax, transposed view": (safetensors.flax, kernel.T),
}
right = []
for name, (library, array) in cases.items():
    library.save_file({"kernel": array}, "kernel.safetensors")
    back = np.asarray(library.load_file("kernel.safetensors")["kernel"])
    right.append(np.array_equal(back, array))
    print(f"{name}: first row {np.asarray(array)[0].tolist()} reads back as {back[0].tolist()}")
sys.exit(0 if right == [True, False, True, False] else 1)
END
