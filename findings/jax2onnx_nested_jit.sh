#!/usr/bin/env bash
# jax2onnx 0.17.1 installs beside jax 0.12.0.1, and fails where a function is jitted inside: jax.nn.relu, jnp.var.
#
# The converter looks for a name that jax no longer has in the one place that handles a nested jax.jit. tanh, softmax,
# the exact GELU, scan and cond go through; relu and variance, which jax itself wraps in a jit, end in "module
# 'jax._src.core' has no attribute 'ClosedJaxpr'". So a layer converts or not by how jax happens to write its
# functions. pip sees no conflict, as the package sets no upper bound on jax; it does set one on orbax-checkpoint,
# which silently becomes older than the newest.
# Seen:
#   tanh: converted
#   softmax: converted
#   exact GELU: converted
#   tanh under jit: module 'jax._src.core' has no attribute 'ClosedJaxpr'
#   relu: module 'jax._src.core' has no attribute 'ClosedJaxpr'
#   variance: module 'jax._src.core' has no attribute 'ClosedJaxpr'
# Touched: whoever turns Flax models into ONNX; a LayerNorm by jnp.var is enough.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax2onnx==0.17.1 jax==0.12.0.1 jaxlib==0.12.0.1 \
    flax==0.12.12 onnx==1.23.2 numpy==2.5.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - 2> "$folder/log" <<'END'
import sys

import jax
import jax.numpy as jnp
from jax2onnx import to_onnx

functions = {
    "tanh": jnp.tanh,
    "softmax": jax.nn.softmax,
    "exact GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "tanh under jit": lambda x: jax.jit(jnp.tanh)(x),
    "relu": jax.nn.relu,
    "variance": lambda x: jnp.var(x, axis=-1),
}
fails = []
for name, function in functions.items():
    try:
        to_onnx(function, [(2, 3)])
        print(f"{name}: converted")
    except AttributeError as error:
        fails.append(name)
        print(f"{name}: {error}")
sys.exit(0 if fails == ["tanh under jit", "relu", "variance"] else 1)
END
