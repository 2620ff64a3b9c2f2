"""Whether two trees of arrays are the same, bit for bit."""

from typing import Any

import jax
import numpy as np


def same_bits(one: Any, other: Any) -> bool:
    """Of trees of the same structure with a leaf at least."""
    leaves = [jax.tree.leaves(tree) for tree in (one, other)]
    assert jax.tree.structure(one) == jax.tree.structure(other) and leaves[0]
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves, strict=True))
