"""Writes the API reference as HTML pages: every public module, from signatures and docstrings, by pdoc.

    python docs/build_api.py DIRECTORY

Needs ``pip install 'beit-jax[docs,train]'``.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

LEFT_OUT = ("beit_jax.cli.main",)


def build(directory: Path) -> None:
    """Writes ``index.html`` and a page per module; existing ones are replaced."""
    import pdoc

    pdoc.render.configure(docformat="google", footer_text="beit-jax")
    pdoc.pdoc(*modules(), output_directory=directory)


def modules() -> list[str]:
    """All that are documented. Named one by one: below a package with ``__all__`` pdoc looks no further."""
    found = ["beit_jax"]
    for entry in walk_packages(import_module("beit_jax").__path__, "beit_jax."):
        if entry.name not in LEFT_OUT:
            found.append(entry.name)
    for name in ("beit_jax.convert", "beit_jax.train"):  # a checkout keeps them beside the library
        found += [name, *(entry.name for entry in walk_packages(import_module(name).__path__, f"{name}."))]
    found = sorted(set(found))
    for name in found:
        package = import_module(name)
        for public in getattr(package, "__all__", ()):  # imported when first used, and not seen before
            getattr(package, public)
    return found


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    build(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
