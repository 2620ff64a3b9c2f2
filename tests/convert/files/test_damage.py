"""Every stored file of another library, cut short or with a changed byte: an error in one line, or what it was.

The kinds are the files in ``tests/convert/foreign``: a new one is tested as soon as it lies there. What a change may do
without notice is `UNCHECKED`, and docs/converting.md says of which kinds.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import damage
import pytest

FOREIGN = Path(__file__).parents[1] / "foreign"
FILES = damage.files(FOREIGN)

UNCHECKED = {"number", "data"}
"""One number of a tensor that differs, or a name of a class: what a file without a checksum cannot show."""


def unchecked(file: Path) -> set[str]:
    """The verdicts that the type of a file cannot rule out. Records of a zip archive have checksums.

    A byte of NumPy's arrays in a pickle says whether their elements lie by rows or, as in Fortran, by columns.
    """
    if file.read_bytes()[:4] == b"PK\3\4":
        return set()
    return UNCHECKED | ({"order"} if file.suffix == ".pdparams" else set())


def outcomes(names: list[str], truncations: int, changes: int) -> dict[str, list[tuple[str, str]]]:
    """What was done to every file, and the verdict. A reader that took the process down is the last of its file."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    waiting = list(names)
    while waiting:
        command = [sys.executable, damage.__file__, str(FOREIGN), str(truncations), str(changes)]
        done = subprocess.run(command, input="\n".join(waiting), capture_output=True, text=True, timeout=600)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for name, what, verdict in lines:
            if verdict == "begun":
                found[name].append((what, "the process ended"))
            else:
                found[name][-1] = (what, verdict)
        last = lines[-1] if lines else ["", "", "nothing was read"]
        assert done.returncode == 0 or last[2] == "begun", (last, done.stderr[-2000:])
        waiting = waiting[waiting.index(last[0]) + 1 :] if done.returncode else []
    return found


def faults(found: dict[str, list[tuple[str, str]]]) -> list[str]:
    allowed = {name: {"refused", "equal"} | unchecked(FOREIGN / name) for name in found}
    return [
        f"{n}, {what}: {verdict}" for n, each in found.items() for what, verdict in each if verdict not in allowed[n]
    ]


def test_some_damage_of_every_file() -> None:
    found = outcomes(FILES, 1, 2)
    assert found.keys() == set(FILES) and all(len(each) == 3 for each in found.values())
    assert not faults(found)


@pytest.mark.thorough
def test_much_damage_of_every_file() -> None:
    found = outcomes(FILES, 20, 200)
    assert found.keys() == set(FILES) and all(len(each) == 220 for each in found.values())
    assert not faults(found)
