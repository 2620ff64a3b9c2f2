#!/usr/bin/env bash
# optax 0.2.8 on jax 0.12.0.1: with bfloat16 parameters Adam's second moment never goes down again.
#
# optax.adamw keeps the second moment in the parameters' type. In bfloat16 its decay 0.999 rounds to 1, so that the
# moment can rise and cannot fall: after large gradients the step stays small for the rest of the run. The option
# mu_dtype=float32, which one would take for the cure, reaches the first moment only, and there is none for the
# second. No warning is given, and the loss goes on falling, more slowly.
# Seen, 100 steps with gradient 1, then 1900 with gradient 0.001:
#   0.999 in bfloat16 is 1.0
#   float32: second moment 0.0952, then 0.0142
#   bfloat16: second moment 0.0981, then 0.0981
#   bfloat16, mu_dtype=float32: second moment 0.0981, then 0.0981
# Touched: whoever trains with parameters in bfloat16; beit-jax keeps them and both moments in float32.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 optax==0.2.8 numpy==2.5.5
"$folder/venv/bin/python" - <<'END'
import sys

import jax
import jax.numpy as jnp
import optax


def second_moments(dtype, **options):
    """after the large gradients, and long after them"""
    optimizer = optax.adamw(1e-3, **options)
    parameters = jnp.ones(4, dtype)
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    seen = []
    for gradient, steps in ((1.0, 100), (1e-3, 1900)):
        for _ in range(steps):
            _, state = update(jnp.full(4, gradient, dtype), state, parameters)
        seen.append(float(state[0].nu[0]))
    return seen


print("0.999 in bfloat16 is", float(jnp.bfloat16(0.999)))
results = {
    "float32": second_moments(jnp.float32),
    "bfloat16": second_moments(jnp.bfloat16),
    "bfloat16, mu_dtype=float32": second_moments(jnp.bfloat16, mu_dtype=jnp.float32),
}
for name, (before, after) in results.items():
    print(f"{name}: second moment {before:.4f}, then {after:.4f}")
fell = {name: after < before for name, (before, after) in results.items()}
sys.exit(0 if list(fell.values()) == [True, False, False] else 1)
END
