"""One number by which a model is known again, whatever file it comes from."""

import json

import numpy as np
import xxhash

from beit_jax.weights.native import NativeCheckpoint


def weights_digest(checkpoint: NativeCheckpoint) -> str:
    """The XXH3 of a model: its configuration, and the names, shapes and bytes of its parameters.

    It is the same for a native checkpoint and for its source, converted in memory; it tells models apart, and protects
    against nobody.
    """
    digest = xxhash.xxh3_128(json.dumps(checkpoint.config.to_hf(), sort_keys=True).encode())
    for name, leaf in sorted(checkpoint.params.items()):
        digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()
