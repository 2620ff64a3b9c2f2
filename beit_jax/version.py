"""This library's version, and a digest of its code, which may differ under one version."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"
PACKAGES = ("beit_jax", "beit_jax.convert", "beit_jax.train")
"""Where the code lies: a checkout keeps the last two beside the first, an installation below it."""


def source_digest() -> str:
    """Sixteen hexadecimal digits that follow from every Python file of the library: its place and its bytes."""
    digest = hashlib.sha256()
    for name, file in sorted(source_files().items()):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def source_files() -> dict[str, Path]:
    """Every Python file of the library by its path within `beit_jax`, the same in a checkout and an installation."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in root.rglob("*.py"):
                found["/".join([*package.split("."), *file.relative_to(root).parts])] = file
    return found
