"""Archives and pickles without weights, by their records and entries."""

import re
from collections.abc import Collection, Iterable, Mapping

from beit_jax.errors import printable

from ..pickles.arrays import MARK
from .kind import BESIDE, KERAS, ORIGINAL, PADDLE_OPTIMIZER, UNPACK, ZERO, Stranger

# Records of a zip archive, behind its first folder or not.
_RECORDS: tuple[tuple[str, Stranger], ...] = (
    (r"constants\.pkl",
     Stranger("a TorchScript program", "torch.save(torch.jit.load(FILE).state_dict(), NEW) keeps its weights")),
    (r"archive_format|serialized_exported_program\.json|models/.*\.json",
     Stranger("a program of torch.export (.pt2)", "torch.save(torch.export.load(FILE).state_dict, NEW) keeps them")),
    (r"\.data/extern_modules", Stranger("a package of torch.package", "load it, and save the model's state_dict()")),
    (r"model\.weights\.npz", Stranger("a .keras archive with weights of NumPy", f"{KERAS}, in HDF5")),
    (r".*\.npy",
     Stranger("an .npz archive of NumPy", "safetensors.numpy.save_file(dict(numpy.load(FILE)), NEW) keeps it")),
    (r"Data/com\.apple\.CoreML/.*|Manifest\.json", Stranger("a Core ML package", ORIGINAL)),
    (r"MAR-INF/.*", Stranger("a model archive of TorchServe", UNPACK)),
)  # fmt: skip


def of_archive(records: Collection[str]) -> Stranger | None:
    """Returns what a zip archive is by the names of its records; None for one that torch.save may have written."""
    bare = [name.partition("/")[2] for name in records]
    for pattern, stranger in _RECORDS:
        if any(re.fullmatch(pattern, name) for name in (*bare, *records)):
            return stranger
    if "data.pkl" in bare or "data.pkl" in records:
        return None
    listed = ", ".join(printable(name, 60) for name in list(records)[:3])
    return Stranger(f"a zip archive of {len(records)} files without data.pkl ({listed})", UNPACK)


def of_entries(entries: Iterable[object], names: Collection[str]) -> Stranger | None:
    """Returns what a dict from a pickle is by its keys.

    Args:
        names: the file's names that no checkpoint needs.
    """
    keys = {key for key in entries if isinstance(key, str)}
    by_paddle = MARK in keys and bool({"LR_Scheduler", "master_weights"} & keys)
    if by_paddle or any(_PADDLE_MOMENT.search(key) for key in keys):
        return PADDLE_OPTIMIZER
    if {"zero_stage"} & keys or {"optimizer_state_dict", "ds_config"} <= keys:
        return ZERO
    if {"state", "param_groups"} <= keys:
        return Stranger("the state of an optimizer, no weights", BESIDE)
    if {"base_lrs", "last_epoch"} <= keys or {"_step_count", "last_epoch"} <= keys:
        return Stranger("the state of a learning rate schedule, no weights", BESIDE)
    if {"random_state", "numpy_random_seed"} <= keys or {"python", "numpy", "cpu"} <= keys:  # accelerate, the Trainer
        return Stranger("the state of random numbers, no weights", BESIDE)
    if any(name.startswith("transformers.training_args") for name in names):
        return Stranger("the settings of transformers' Trainer, no weights", BESIDE)
    return None


_PADDLE_MOMENT = re.compile(r"_(moment\d?|velocity|beta\d_pow_acc|mean_square|mean_grad|inf_norm)_\d+$")


def sharded_by_zero(shapes: Iterable[tuple[int, ...]], entries: Mapping[object, object]) -> Stranger | None:
    """Returns ZeRO's third stage, in which a model's tensors are left empty; `shapes` are those of the tensors."""
    told = {"ds_version", "ds_config", "param_shapes"} & {key for key in entries if isinstance(key, str)}
    return ZERO if told and all(0 in shape for shape in shapes) else None
