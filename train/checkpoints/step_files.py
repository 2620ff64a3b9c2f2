"""Names of checkpoints in their directory.

``N`` is a saved step, ``N.tmp-1`` one on its way, ``N.tmp`` one being deleted, ``N.bad`` a damaged one.
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
    """The entries of a directory that are checkpoints, or were."""

    def __init__(self, directory: Path):
        self._directory = directory

    def path(self, step: int) -> Path:
        """Where a saved step is."""
        return self._directory / str(step)

    def temporary(self, step: int, attempt: int) -> Path:
        """Where a step is until it is saved. A failed attempt may still be writing when the next one begins."""
        return self._directory / f"{step}.tmp-{attempt}"

    def steps(self) -> list[int]:
        """What has the name of a saved step, in order."""
        return sorted(int(path.name) for path in self._named(_STEP))

    def bad(self) -> list[str]:
        """Names of damaged steps."""
        return sorted(path.name for path in self._named(_BAD))

    def remove_leftovers(self) -> Iterator[tuple[Path, int]]:
        """Removes what is half written or half deleted while nobody writes: paths and their bytes."""
        for path in sorted(self._named(_TEMPORARY)):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
            yield path, size

    def discard(self, temporary: Path) -> None:
        """Frees the space of a save that failed. What resists is left to `remove_leftovers`."""
        for path in list(self._named(_TEMPORARY)):
            if path.name == temporary.name or path.name.startswith(f"{temporary.name}."):
                shutil.rmtree(path, ignore_errors=True)

    def delete_old(self, keep: int) -> None:
        """Deletes all but the newest steps. A step that is half deleted no longer has the name of one."""
        for step in self.steps()[:-keep]:
            shutil.rmtree(self.path(step).rename(self._directory / f"{step}.tmp"))

    def quarantine(self, step: int) -> str:
        """Takes the name of a step from what is none; returns the new one.

        Raises:
            BeitJaxError: it cannot be renamed.
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
