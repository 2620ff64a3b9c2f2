#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1, CPU: jnp.asarray of a NumPy array copies it, and with the dtype that it has already it does not.
#
# The second array of JAX is the first one's memory, if that begins at a multiple of 64 bytes: a later write to the NumPy
# array changes an array of JAX, which is said to be immutable. The dtype is the only difference between the two calls.
# jax.device_put shares too; jnp.array, with a dtype or without, copies.
# Seen, of ones that are set to two afterwards, with both versions:
#   asarray(a): 1.0
#   asarray(a, a.dtype): 2.0
#   device_put(a): 2.0
#   array(a, a.dtype): 1.0
# Touched: whoever fills one buffer again and again, or changes a checkpoint's arrays after a model was made of them.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/seen.py" <<'END'
import jax
import jax.numpy as jnp
import numpy as np

WAYS = {
    "asarray(a)": jnp.asarray,
    "asarray(a, a.dtype)": lambda a: jnp.asarray(a, a.dtype),
    "device_put(a)": jax.device_put,
    "array(a, a.dtype)": lambda a: jnp.array(a, a.dtype),
}
seen = []
for name, way in WAYS.items():
    memory = np.empty(4096 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 4096].view(np.float32)
    array[:] = 1
    found = jax.block_until_ready(way(array))
    array[:] = 2
    seen.append(float(found[0]))
    print(f"{name}: {seen[-1]}")
raise SystemExit(seen != [1.0, 2.0, 2.0, 1.0])
END
for version in 0.10.2 0.12.0.1; do
    "$PYTHON" -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version" numpy==2.5.5
    echo "jax $version"
    JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/seen.py"
done
