#!/usr/bin/env bash
# flax 0.12.12: flax.serialization.from_bytes checks its target's names, and neither its shapes nor its types.
#
# The first argument is a target, a tree "with the desired structure"; a missing or an additional name in it raises.
# An array of another shape or type does not: what comes back is the file's array, whatever the target says.
# Parameters of a model for 384 pixels thus "restore" from a file for 224, and a bfloat16 file turns a float32 model
# into a bfloat16 one; the complaint comes later and elsewhere, or not at all where shapes broadcast.
# Seen:
#   target (4, 8) float32, restored (1, 8) bfloat16
#   target of another name: ValueError
# Touched: whoever reads flax_model.msgpack of the former FlaxBeit models; shapes have to be compared by the reader.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 numpy==2.5.5
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import sys

import jax.numpy as jnp
from flax import serialization

file = serialization.to_bytes({"scale": jnp.ones((1, 8), jnp.bfloat16)})
back = serialization.from_bytes({"scale": jnp.zeros((4, 8), jnp.float32)}, file)["scale"]
print(f"target (4, 8) float32, restored {back.shape} {back.dtype}")
try:
    serialization.from_bytes({"gain": jnp.zeros((4, 8), jnp.float32)}, file)
    other = "restored"
except ValueError:
    other = "ValueError"
print(f"target of another name: {other}")
sys.exit(0 if (back.shape, str(back.dtype), other) == ((1, 8), "bfloat16", "ValueError") else 1)
END
