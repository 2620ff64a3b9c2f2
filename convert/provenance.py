"""The origin of converted weights, as a native checkpoint records it."""

from collections.abc import Mapping
from typing import Any

from beit_jax.hub import Source
from beit_jax.version import __version__

from .files.checkpoint import Checkpoint


def provenance(
    source: Source,
    checkpoint: Checkpoint,
    naming: str,
    digests: Mapping[str, str | None],
    options: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Returns the record.

    Args:
        naming: the name of the source format.
        digests: SHA-256 of every weight file by its name, None where it is not known.
        options: the options that differ from their defaults.
    """
    return {
        "source": source.name,
        "revision": source.revision,
        "files": dict(digests),
        "format": checkpoint.format,
        "naming": naming,
        "options": dict(options),
        "converter": f"beit-jax {__version__}",
    }
