"""The version of this library, and a digest of its code: two different checkouts may have the same version."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"
PACKAGES = ("beit_jax", "beit_jax.convert", "beit_jax.train")
"""The packages of the code: in a checkout the last two lie beside the first, in an installation below it."""


def source_digest() -> str:
    """A digest of the paths and the bytes of all Python files of the library: sixteen hexadecimal digits."""
    digest = hashlib.sha256()
    for name, file in sorted(source_files().items()):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def source_files() -> dict[str, Path]:
    """All Python files of the library by their paths in `beit_jax`, the same in a checkout and an installation."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in root.rglob("*.py"):
                found["/".join([*package.split("."), *file.relative_to(root).parts])] = file
    return found
