#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a name with a dot overwrites a nested one, and both are restored with one's numbers.
#
# Orbax stores the leaf b of the branch a under "a.b". A leaf that is itself called "a.b", as the flat names of
# PyTorch and safetensors are, gets the same place: one of the two is written over, not always the same one, saving
# succeeds, and the restored tree has both leaves, right shapes, and the same numbers twice. A slash in a name does no
# harm, so that a tree with flat names alone, or a test of one with slashes, shows nothing. Both the ordinary and the
# v1 interface do it.
# Seen, with 2 saved for the nested leaf and 3 for the dotted one:
#   ordinary, nested first: nested 2, flat 2
#   ordinary, dotted first: nested 3, flat 3
#   ordinary, with a slash: nested 2, flat 3
#   new, nested first: nested 2, flat 2
#   new, dotted first: nested 2, flat 2
#   new, with a slash: nested 2, flat 3
# Touched: whoever keeps tensors under PyTorch's names beside a nested tree in one checkpoint.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.12.0.1 jaxlib==0.12.0.1 \
    tensorstore==0.1.86 numpy==2.5.5
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - 2> log <<'END'
import pathlib
import sys

import numpy as np
import orbax.checkpoint
from orbax.checkpoint.experimental import v1


def ordinary(place, tree):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(place)


def new(place, tree):
    v1.save(place, tree)
    return v1.load(place)


two, three = np.full(3, 2, np.float32), np.full(3, 3, np.float32)
trees = {
    "nested first": {"a": {"b": two}, "a.b": three},
    "dotted first": {"a.b": three, "a": {"b": two}},
    "with a slash": {"a/b": three, "a": {"b": two}},
}
lost = []
for interface in (ordinary, new):
    for name, tree in trees.items():
        back = interface(pathlib.Path(f"{interface.__name__} {name}").resolve(), tree)
        flat = next(back[key] for key in ("a.b", "a/b") if key in back)
        print(f"{interface.__name__}, {name}: nested {back['a']['b'][0]:.0f}, flat {flat[0]:.0f}")
        lost.append(np.array_equal(back["a"]["b"], flat))
sys.exit(0 if lost == [True, True, False] * 2 else 1)
END
