#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1, CPU: jax.checkpoint with a policy copies every float32 array that it keeps, bit for bit.
#
# What a policy saves passes through reduce_precision of its own dtype, 8 and 23 bits for float32, so that compilers
# which compute in excess precision keep the same number twice. XLA's CPU compiler computes float32 as float32, and
# leaves the operation in: a pass through memory for each array, beside the one that writes it to the loop's stack.
# Results are equal; only a profile shows it.
# Seen, of operations in the compiled gradient of a scanned layer, for both versions:
#   without checkpoint: 0 reduce-precision
#   checkpoint_dots: 2 reduce-precision, of f32[64,64], exponent_bits=8, mantissa_bits=23
#   gradients have the same bits: True
# Touched: whoever trains on a CPU with rematerialisation by a policy; some 30 ms of a step of 3.5 s of BEiT-B.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/seen.py" <<'END'
import re
import sys

import jax
import jax.numpy as jnp

x = jax.random.normal(jax.random.key(0), (64, 64))
kernels = jax.random.normal(jax.random.key(1), (3, 64, 64)) / 8


def layer(x, kernel):
    return jnp.sin(x @ kernel), None


found, gradients = {}, []
dots = jax.checkpoint(layer, policy=jax.checkpoint_policies.checkpoint_dots)
pattern = r"= (f32\[[\d,]+\])\S* reduce-precision\(.*?(exponent_bits=\d+, mantissa_bits=\d+)"
for name, form in {"without checkpoint": layer, "checkpoint_dots": dots}.items():
    program = jax.jit(jax.grad(lambda kernels: jax.lax.scan(form, x, kernels)[0].sum())).lower(kernels).compile()
    lines = re.findall(pattern, program.as_text())
    found[name] = lines
    gradients.append(program(kernels))
    kinds = "".join(f", of {shape}, {bits}" for shape, bits in sorted(set(lines)))
    print(f"{name}: {len(lines)} reduce-precision{kinds}")
same = bool((gradients[0] == gradients[1]).all())
print("gradients have the same bits:", same)
kept = ("f32[64,64]", "exponent_bits=8, mantissa_bits=23")
sys.exit(0 if not found["without checkpoint"] and set(found["checkpoint_dots"]) == {kept} and same else 1)
END
for version in 0.10.2 0.12.0.1; do
    "$PYTHON" -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version" numpy==2.5.5
    echo "jax $version"
    JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/seen.py"
done
