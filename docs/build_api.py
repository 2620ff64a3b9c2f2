"""Writes the API reference as HTML pages: every public module, from signatures and docstrings, by pdoc.

    python docs/build_api.py DIRECTORY

Needs ``pip install 'beit-jax[docs,train]'``.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

PACKAGES = ("beit_jax", "beit_jax.convert", "beit_jax.train")
LEFT_OUT = ("beit_jax.__main__",)


def build(directory: Path) -> None:
    """Writes ``index.html`` and a page per module; existing ones are replaced."""
    import pdoc

    pdoc.render.configure(docformat="google", footer_text="beit-jax")
    pdoc.pdoc(*modules(), output_directory=directory)


def modules() -> list[str]:
    """All that are documented. Named one by one: below a package with ``__all__`` pdoc looks no further."""
    found = []
    for name in PACKAGES:
        package = import_module(name)
        for public in getattr(package, "__all__", ()):  # imported when first used, and not seen before
            getattr(package, public)
        below = (f"{name}.{entry.name}" for entry in iter_modules(package.__path__))
        found += [name, *(module for module in below if module not in (*PACKAGES, *LEFT_OUT))]
    return found


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    build(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
