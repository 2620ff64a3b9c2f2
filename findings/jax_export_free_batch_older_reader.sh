#!/usr/bin/env bash
# jax.export: what jax 0.12.0.1 writes with a free batch, jax 0.10.2 deserialises, and cannot call.
#
# The same function, exported once for a batch of two and once for any batch. jax 0.10.2 deserialises both, gives
# their shapes and the same calling convention version, and runs the first. The second fails at its first call: the
# check of sizes that a free dimension brings is an operation the older reader does not know. jax promises older
# readers only three weeks; the surprise is that a reader that loads everything and runs one of the two says nothing
# of the other until it serves a request. The other way round, both work.
# Seen:
#   0.10.2 read by 0.12.0.1, batch of two: loaded (convention 10), called
#   0.10.2 read by 0.12.0.1, batch of any: loaded (convention 10), called
#   0.12.0.1 read by 0.10.2, batch of two: loaded (convention 10), called
#   0.12.0.1 read by 0.10.2, batch of any: loaded (convention 10), raises
# Touched: whoever writes programs on a new jax for an older server; a test must call, not only load.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.12.0.1 0.10.2; do
    "$PYTHON" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version" \
        flatbuffers==25.12.19 numpy==2.4.6
done
cd "$folder"
cat > write.py <<'END'
import jax
import jax.numpy as jnp
from jax import export

(batch,) = export.symbolic_shape("batch")
for name, size in (("two", 2), ("any", batch)):
    shape = jax.ShapeDtypeStruct((size, 3), jnp.float32)
    exported = export.export(jax.jit(jnp.tanh), platforms=["cpu"])(shape)
    with open(f"{jax.__version__}-{name}", "wb") as file:
        file.write(exported.serialize())
END
cat > read.py <<'END'
import sys

import jax
import jax.numpy as jnp
from jax import export

writer, *expected = sys.argv[1:]
seen = []
for name in ("two", "any"):
    with open(f"{writer}-{name}", "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    try:
        exported.call(jnp.ones((2, 3), jnp.float32))
        seen.append("called")
    except jax.errors.JaxRuntimeError as error:
        seen.append("raises")
    version = exported.calling_convention_version
    print(f"{writer} read by {jax.__version__}, batch of {name}: loaded (convention {version}), {seen[-1]}")
sys.exit(0 if seen == expected else 1)
END
export JAX_PLATFORMS=cpu
0.12.0.1/bin/python write.py
0.10.2/bin/python write.py
0.12.0.1/bin/python read.py 0.10.2 called called
0.10.2/bin/python read.py 0.12.0.1 called raises
