#!/usr/bin/env bash
# optax 0.2.8 on jax 0.12.0.1: jax.jit(optimizer.init) puts the moments of sharded parameters on one device.
#
# optimizer.init(parameters) gives each moment its parameter's sharding; under jax.jit, which one adds to save memory
# and time, every moment is whole and on the first device, twice the model's size in one place. The compiler keeps an
# input's sharding only where the output is computed from it, and zeros are not: the same function as x * 0 stays
# sharded. The values are right, training goes on, and the first step spreads them again; what one may see is a memory
# error at the start of a run that fits. out_shardings, given by hand, is the way.
# Seen, parameters over four virtual devices:
#   optimizer.init: 4 device(s), (2, 8) on the first
#   jax.jit(optimizer.init): 1 device(s), (8, 8) on the first
#   jax.jit of x * 0: 4 device(s), (2, 8) on the first
# Touched: whoever trains with sharded parameters; beit-jax passes out_shardings.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 optax==0.2.8 numpy==2.5.5
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 "$folder/venv/bin/python" - <<'END'
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
parameters = {"kernel": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("data")))}
optimizer = optax.adam(1e-3)


def times_zero(tree):
    return jax.tree.map(lambda leaf: leaf * 0, tree)


results = {
    "optimizer.init": optimizer.init(parameters)[0].mu,
    "jax.jit(optimizer.init)": jax.jit(optimizer.init)(parameters)[0].mu,
    "jax.jit of x * 0": jax.jit(times_zero)(parameters),
}
devices = []
for name, tree in results.items():
    kernel = tree["kernel"]
    devices.append(len(kernel.sharding.device_set))
    print(f"{name}: {devices[-1]} device(s), {kernel.addressable_shards[0].data.shape} on the first")
sys.exit(0 if devices == [4, 1, 4] else 1)
END
