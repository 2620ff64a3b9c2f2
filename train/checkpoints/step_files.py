"""The names of checkpoints in their directory.

``N`` is a saved step, ``N.tmp-1`` a step that is being written, ``N.tmp`` a step that is being deleted, ``N.bad`` a
damaged step.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from beit_jax.errors import BeitJaxError

_STEP = re.compile(r"0|[1-9]\d*")
_TEMPORARY = re.compile(r"\d+\.tmp(-\d+)?(\.orbax-checkpoint-tmp.*)?")
_BAD = re.compile(r"\d+\.bad(-\d+)?")


class StepFiles:
    """The entries of a directory that are or were checkpoints."""

    def __init__(self, directory: Path):
        self._directory = directory

    def path(self, step: int) -> Path:
        """The path of a saved step."""
        return self._directory / str(step)

    def temporary(self, step: int, attempt: int) -> Path:
        """The path of a step until it is saved. A failed attempt may still write when the next attempt begins."""
        return self._directory / f"{step}.tmp-{attempt}"

    def steps(self) -> list[int]:
        """The numbers of all entries that have the name of a saved step, in order."""
        return sorted(int(path.name) for path in self._named(_STEP))

    def bad(self) -> list[str]:
        """The names of damaged steps."""
        return sorted(path.name for path in self._named(_BAD))

    def remove_leftovers(self) -> Iterator[tuple[Path, int]]:
        """Removes half written and half deleted steps, and yields their paths and bytes. Nobody may write meanwhile."""
        for path in sorted(self._named(_TEMPORARY)):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
            yield path, size

    def discard(self, temporary: Path) -> None:
        """Frees the space of a save that failed. What cannot be removed now is left to `remove_leftovers`."""
        for path in list(self._named(_TEMPORARY)):
            if path.name == temporary.name or path.name.startswith(f"{temporary.name}."):
                shutil.rmtree(path, ignore_errors=True)

    def delete_old(self, keep: int) -> None:
        """Deletes all but the newest steps. A half deleted step no longer has the name of a step."""
        for step in self.steps()[:-keep]:
            shutil.rmtree(self.path(step).rename(self._directory / f"{step}.tmp"))

    def quarantine(self, step: int) -> str:
        """Renames a damaged step, and returns the new name.

        Raises:
            BeitJaxError: the step cannot be renamed.
        """
        path, number = self.path(step), 1
        bad = path.with_name(f"{step}.bad")
        while bad.exists():
            number += 1
            bad = path.with_name(f"{step}.bad-{number}")
        try:
            return path.rename(bad).name
        except OSError as error:
            raise BeitJaxError(f"{path}: damaged, and cannot be renamed ({error.strerror}); move it away") from None

    def _named(self, pattern: re.Pattern[str]) -> Iterator[Path]:
        return (path for path in self._directory.iterdir() if pattern.fullmatch(path.name))
