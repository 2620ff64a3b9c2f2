"""The index of a checkpoint in several files: it says which tensor is in which shard.

An index and its shards must agree completely. transformers is less strict: it follows ``..`` and absolute paths, takes
one of two copies of a tensor, and does not notice a tensor that is in another shard than the index says.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import DuplicateKeyError, parse_json

from .weight_file import RandomAccessFile, TensorInfo, shown

INDEX_SUFFIX = ".index.json"
MAX_INDEX = 8 * 2**20


class ShardIndex:
    """``*.index.json``, read and checked without its shards.

    Attributes:
        owner: for every tensor the file name of its shard.
        shards: the file names, sorted.

    Raises:
        BeitJaxError: the file is no JSON, has a name twice, has no or an empty ``weight_map``, or names a shard that is
            not a plain file name.
    """

    def __init__(self, path: Path) -> None:
        self._label = printable(path, 1024)
        self._directory = path.parent
        content = _load(path, self._label)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            found = "none" if weight_map is None else "an empty one" if weight_map == {} else type(weight_map).__name__
            raise BeitJaxError(
                f"{self._label}: expected a table weight_map of tensor names and file names, found {found}"
            )
        for name, shard in weight_map.items():
            if not is_plain(shard):
                raise BeitJaxError(
                    f"{self._label} sends tensor {printable(name)} to {shown(shard)}; "
                    "expected the name of a file beside it, without any folder"
                )
        self.owner = _without_model(weight_map)
        self.shards = sorted(set(weight_map.values()))
        metadata = content.get("metadata")
        self._total_size = metadata.get("total_size") if isinstance(metadata, dict) else None

    def locate(self, shard: str) -> Path:
        """Returns the path of a shard. Raises `BeitJaxError` if it is missing, or a link that leaves the directory."""
        path = self._directory / shard
        if not path.exists():
            count = Counter(self.owner.values())[shard]
            raise BeitJaxError(
                f"{self._label} needs {printable(shard)}, which is not there; "
                f"it holds {count} of {len(self.owner)} tensors: download it"
            )
        check_inside(self._directory, path, self._label)
        return path

    def check(self, found: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
        """Compares the index with the tensors of its shards and returns notes. Raises `BeitJaxError`."""
        holder: dict[str, str] = {}
        for shard, tensors in found.items():
            for name in tensors:
                if name in holder:
                    raise BeitJaxError(
                        f"{self._label}: tensor {printable(name)} is both in {printable(holder[name])} "
                        f"and in {printable(shard)}; expected it in {printable(self.owner.get(name))} only"
                    )
                holder[name] = shard
        for name in sorted(self.owner.keys() | holder.keys()):
            if self.owner.get(name) != holder.get(name):
                said = f"says {printable(self.owner[name])}" if name in self.owner else "does not list it"
                has = f"it is in {printable(holder[name])}" if name in holder else "no shard holds it"
                raise BeitJaxError(f"{self._label}: tensor {printable(name)}: the index {said}, but {has}")
        held = sum(info.nbytes for tensors in found.values() for info in tensors.values())
        if self._total_size not in (None, held):
            return [f"{self._label}: total_size is {shown(self._total_size)}, but the shards hold {held} bytes"]
        return []


def _without_model(owner: dict[str, str]) -> dict[str, str]:
    """TensorFlow's index puts the name of the model before all names, which its shards leave out."""
    model = next(iter(owner)).partition("/")[0]
    if not model.startswith("tf_") or not all(name.startswith(f"{model}/") and name.endswith(":0") for name in owner):
        return owner
    return {name.removeprefix(f"{model}/"): shard for name, shard in owner.items()}


def _load(path: Path, label: str) -> dict[str, Any]:
    file = RandomAccessFile(path)
    try:
        if file.size > MAX_INDEX:
            raise BeitJaxError(f"{label} has {file.size} bytes; expected at most {MAX_INDEX}")
        content = parse_json(file.read(0, file.size, "the index"))
    except DuplicateKeyError as error:
        raise BeitJaxError(f"{label} names {printable(error)} twice; expected every name once") from None
    except BeitJaxError:
        raise
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"{label} is not valid JSON: {printable(error)}") from None
    finally:
        file.close()
    if not isinstance(content, dict):
        raise BeitJaxError(f"{label} holds a {type(content).__name__}; expected a JSON object with a weight_map")
    return content


def check_inside(directory: Path, path: Path, label: str) -> None:
    """Refuses a file that another file names, and that is a link out of their directory.

    A Hugging Face cache keeps files in blobs/, and links to them in snapshots/<revision>/. Only such a link may leave
    the directory; a name with folders is refused before, see `is_plain`.

    Raises:
        BeitJaxError: names the file, its target, and the file `label` that names it.
    """
    directory, target = directory.resolve(), path.resolve()
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise BeitJaxError(
            f"{label} names {printable(path.name)}, a link to {printable(target, 1024)}; "
            "expected a file in the same directory"
        )


def is_plain(name: object) -> bool:
    """True if `name` is a file of the same directory on any system. A colon names a drive or a stream in Windows."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\:\0")
