#!/usr/bin/env bash
# jax 0.10.2, CPU: jax.checkpoint of layers that are not in a loop of XLA computes them again and saves no memory.
#
# jax.checkpoint computes a layer again on the way back. Within jax.lax.scan it saves the memory that it should. Of the
# same layers in a loop of Python (or with unroll=True), jax 0.10.2 computes them again, as its products show, and still
# holds as much as without, although prevent_cse is True by default; a schedule for little memory (the option
# xla_cpu_scheduler_type) changes nothing. jax 0.12.0.1 saves it.
# Seen, of the compiled gradient's temporary memory in MB, and its products, jax 0.10.2 (0.12.0.1):
#   scan: 925 (724), 6 products; with checkpoint 98 (98), 7
#   loop of Python: 477 (463), 70 products; with checkpoint 477 (98), 81
#   the same with checkpoint, scheduled for memory: 484 (71), 81
# Touched: whoever writes loops over layers out, for speed or by habit, and counts on rematerialisation.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/seen.py" <<'END'
import sys

import jax
import jax.numpy as jnp

LAYERS, ROWS, WIDTH = 12, 4096, 256
x = jnp.ones((ROWS, WIDTH))
kernels = jnp.full((LAYERS, 2, WIDTH, 4 * WIDTH), 0.01)


def layer(x, pair):
    return x + jnp.sin(jnp.tanh(x @ pair[0])) @ pair[1].T, None


def scanned(layer, kernels):
    return jax.lax.scan(layer, x, kernels)[0].sum()


def written_out(layer, kernels):
    value = x
    for pair in kernels:
        value, _ = layer(value, pair)
    return value.sum()


def seen(loop, layer, options=None):
    gradient = jax.grad(lambda kernels: loop(layer, kernels))
    program = jax.jit(gradient, compiler_options=options).lower(kernels).compile()
    return program.memory_analysis().temp_size_in_bytes / 1e6, program.as_text().count(" dot(")


little = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
again = jax.checkpoint(layer)
found = {
    "scan": seen(scanned, layer),
    "scan, checkpoint": seen(scanned, again),
    "loop of Python": seen(written_out, layer),
    "loop of Python, checkpoint": seen(written_out, again),
    "loop of Python, checkpoint, scheduled for memory": seen(written_out, again, little),
}
for name, (memory, products) in found.items():
    print(f"{name}: {memory:.0f} MB, {products} products")
scan, scan_again, plain, plain_again, scheduled = found.values()
saved = scan_again[0] < scan[0] / 4 and plain_again[1] > plain[1]
if jax.__version__ == "0.10.2":
    sys.exit(0 if saved and min(plain_again[0], scheduled[0]) >= plain[0] else 1)
sys.exit(0 if saved and max(plain_again[0], scheduled[0]) < plain[0] / 4 else 1)
END
for version in 0.10.2 0.12.0.1; do
    "$PYTHON" -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version" numpy==2.5.5
    echo "jax $version"
    JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/seen.py"
done
