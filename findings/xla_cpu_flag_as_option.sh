#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1, CPU: an XLA flag that XLA_FLAGS obeys is accepted as an option of jax.jit, and ignored.
#
# xla_cpu_enable_concurrency_optimized_scheduler=false in XLA_FLAGS orders operations for little memory instead of for
# concurrency. In jax.jit(..., compiler_options={...}) the same name with False raises nothing (a name that does not
# exist would, and so does the text "false") and changes nothing. xla_cpu_scheduler_type is what does it there.
# Seen, of the compiled program's temporary memory in MB, jax 0.10.2 (0.12.0.1):
#   nothing said: 25.2 (12.6)
#   the flag off, as an option: 25.2 (12.6)
#   xla_cpu_scheduler_type for memory, as an option: 2.1 (1.0)
#   the flag off, in XLA_FLAGS: 2.1 (1.0)
# Touched: whoever sets it for one program, and believes it; 1.53 GB instead of 1.26 of a step of BEiT-B.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/seen.py" <<'END'
import json
import sys

import jax
import jax.numpy as jnp


def total(matrices):
    sums = []
    for i in range(len(matrices)):
        matrix = matrices[i]
        value = jnp.sin(matrix)
        for _ in range(3):
            value = jnp.tanh(value @ matrix)
        sums.append(value.sum())
    return sum(sums)


matrices = jnp.ones((12, 512, 512))
options = json.loads(sys.argv[1]) or None
program = jax.jit(total, compiler_options=options).lower(matrices).compile()
print(f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f}")
END
for version in 0.10.2 0.12.0.1; do
    "$PYTHON" -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version" numpy==2.5.5
    echo "jax $version"
    export JAX_PLATFORMS=cpu
    flag=xla_cpu_enable_concurrency_optimized_scheduler
    seen() { "$folder/venv/bin/python" "$folder/seen.py" "$1"; }
    default=$(seen '{}')
    off=$(seen "{\"$flag\": false}")
    kind=$(seen '{"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}')
    in_flags=$(XLA_FLAGS="--$flag=false" seen '{}')
    echo "nothing said: $default"
    echo "the flag off, as an option: $off"
    echo "xla_cpu_scheduler_type for memory, as an option: $kind"
    echo "the flag off, in XLA_FLAGS: $in_flags"
    [ "$off" = "$default" ] && [ "$kind" = "$in_flags" ] && [ "$in_flags" != "$default" ]
done
