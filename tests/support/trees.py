"""What a directory holds, to be compared before and after."""

import os
from pathlib import Path

Tree = dict[str, bytes | str | None]


def tree(root: Path) -> Tree:
    """Everything under `root`: bytes of files, targets of links, None for directories."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(root.rglob("*"))
    }
