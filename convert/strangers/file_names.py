"""Files that are no weights by their names, and folders by the names of their files."""

import re
from collections.abc import Iterable

from .kind import AGAIN, KERAS, ORIGINAL, PADDLE_OPTIMIZER, PADDLE_PARTS, PADDLE_PROGRAM, ZERO, Stranger

# Files of a folder.
_FILES: tuple[tuple[str, Stranger], ...] = (
    (r"saved_model\.pb", Stranger("a SavedModel of TensorFlow", KERAS)),
    (r".*\.(pdmodel|pdiparams)", PADDLE_PROGRAM),
    (r"\d+\.metadata|\d+_\d+\.distcp", PADDLE_PARTS),
    (r"zero_to_fp32\.py|zero_pp_rank_.*|.*_optim_states\.pt|global_step\d+", ZERO),
    (r".*\.ckpt\.index|.*\.data-\d{5}-of-\d{5}",
     Stranger("a checkpoint of TensorFlow", "load it there, and save its model")),
    (r"manifest\.ocdbt|_CHECKPOINT_METADATA",
     Stranger("a checkpoint of Orbax", "restore it, and save its parameters by safetensors")),
    (r".*\.(incomplete|crdownload|part|download)", Stranger("half a download", AGAIN)),
    (r".*\.onnx", Stranger("an ONNX program", ORIGINAL)),
    (r".*\.gguf", Stranger("GGUF, of ggml", ORIGINAL)),
    (r".*\.tflite", Stranger("TFLite, a program of TensorFlow Lite", ORIGINAL)),
    (r".*\.mlmodel|.*\.mlpackage", Stranger("a Core ML model", ORIGINAL)),
    (r"shard-\d+-.+-\d+-of-\d+\.safetensors",
     Stranger("the parts of several processes, as torch.distributed.checkpoint's HuggingFaceStorageWriter leaves them",
              "consolidate_safetensors_files(DIRECTORY, NEW, {name: 1 for each tensor's name}) of "
              "torch.distributed.checkpoint._consolidate_hf_safetensors joins them, and so does the writer with "
              "enable_consolidation=True")),
    (r"optimizer\.(pt|bin)|scheduler\.(pt|bin)|training_args\.bin",
     Stranger("the training state without its model", "give the directory of the model")),
)  # fmt: skip


def of_folder(files: Iterable[str]) -> Stranger | None:
    """Returns what a directory is by the names of its files; None if no mark tells it."""
    names = list(files)
    for pattern, stranger in _FILES:
        if any(re.fullmatch(pattern, name) for name in names):
            return stranger
    return None


def of_name(file: str) -> Stranger | None:
    """Returns what a file is by its name alone; None for any name that weights may have."""
    if file.endswith((".incomplete", ".crdownload", ".part", ".download", ".aria2")):
        return Stranger("half a download, as its name says", AGAIN)
    if file.endswith((".onnx.data", ".onnx_data")):
        return Stranger("the numbers of an ONNX program", ORIGINAL)
    if file.endswith((".pdmodel", ".pdiparams", ".pdiparams.info")):
        return PADDLE_PROGRAM
    if file.endswith(".pdopt"):
        return PADDLE_OPTIMIZER
    if file.endswith((".pdstates", ".pdscaler")):
        return Stranger("the settings of a training in Paddle, no weights", "give the .pdparams beside it")
    if file == "saved_model.pb":
        return Stranger("the program of a SavedModel of TensorFlow", KERAS)
    if re.fullmatch(r".+\.(index|data-\d{5}-of-\d{5})", file):
        return Stranger("a part of a checkpoint of TensorFlow", f"load all of it there: {KERAS}")
    if file.endswith(".weights.json"):
        return Stranger("the index of Keras' weights in several files", KERAS)
    if re.fullmatch(r"\d+_\d+\.distcp", file):
        return PADDLE_PARTS
    if file.endswith(".distcp"):
        return Stranger("a part of a checkpoint of torch.distributed.checkpoint", "give its directory")
    return None
