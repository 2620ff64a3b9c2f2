"""Files that are no weights of BEiT for this library, each by its own mark: what wrote it, and what makes it readable.

The marks are those that the programs themselves write: first bytes, records of an archive, entries of a pickle, names
of tensors, and files of a folder. What no mark tells is left to the reader that meets it.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from beit_jax.errors import printable

from ..pickles.arrays import MARK


@dataclass(frozen=True)
class Stranger:
    """A kind of file: `what` it is, with the program that made it, and the `way` to weights that are read."""

    what: str
    way: str

    def __str__(self) -> str:
        return f"{self.what}; {self.way}"


_ORIGINAL = "convert the checkpoint that it was made of"
_NOTHING = "nothing here computes it"
_BESIDE = "give the model's file beside it"
_KERAS = "load it in Keras, and model.save('NEW.keras') keeps the names of its layers beside the weights"
_UNPACK = "unpack it, and give what is in it"
_AGAIN = "download it again"

_PADDLE_PROGRAM = Stranger(
    "a program of Paddle for inference (paddle.jit.save), whose weights are numbered and have no names",
    "convert the .pdparams that it was made of: with its model in Paddle, paddle.save(model.state_dict(), "
    "'NEW.pdparams') writes them",
)
_PADDLE_PARTS = Stranger(
    "a checkpoint of paddle.distributed, in parts",
    "in Paddle, paddle.save(paddle.distributed.load_merged_state_dict('DIRECTORY'), 'NEW.pdparams') joins them",
)
_PADDLE_OPTIMIZER = Stranger("the state of an optimizer of Paddle, no weights", "give the .pdparams beside it")

# First bytes at an offset. The first that fits counts.
_HEADS: tuple[tuple[int, bytes, Stranger], ...] = (
    (0, b"GGUF", Stranger("GGUF, of ggml (llama.cpp, stable-diffusion.cpp), mostly quantised", _ORIGINAL)),
    (4, b"TFL3", Stranger("TFLite, a program of TensorFlow Lite", _ORIGINAL)),
    (
        0,
        b"\x93NUMPY",
        Stranger("one array of NumPy", "save all tensors by name, by safetensors"),
    ),
    (
        257,
        b"ustar",
        Stranger("a tar archive, which PyTorch before 0.2 wrote", "load it there and save it again, or unpack it"),
    ),
    (0, b"\x1f\x8b", Stranger("gzip-compressed", "gunzip it, and give what is in it")),
    (0, b"\xfd7zXZ\0", Stranger("compressed by xz", _UNPACK)),
    (0, b"BZh", Stranger("compressed by bzip2", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Stranger("compressed by zstd", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Stranger("a 7-Zip archive", _UNPACK)),
    (0, b"Rar!", Stranger("a RAR archive", _UNPACK)),
    (0, b"PAR1", Stranger("a Parquet table of data", "give the weights beside it")),
    (0, b"%PDF", Stranger("a PDF document", _AGAIN)),
    (0, b"\x89PNG", Stranger("a PNG image", "give the model's weights")),
    (0, b"\xff\xd8\xff", Stranger("a JPEG image", "give the model's weights")),
    (0, b"\x7fELF", Stranger("a program", "give the model's weights")),
)


def of_bytes(head: bytes, suffix: str) -> Stranger | None:
    """Returns what a file is whose first 512 bytes are `head`; None if no mark tells it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        size = text.partition(b"\nsize ")[2].split(b"\n")[0]
        found = f"a Git LFS pointer to a file of {printable(size.decode('latin-1'))} bytes (run: git lfs pull)"
        return Stranger(found, "the weights themselves are not here yet")
    if head and not head.strip(b"\0"):
        return Stranger("nothing but zeros at its start, as a download that was not finished", _AGAIN)
    if text.startswith((b"# xet version", b"outs:", b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return Stranger(
            "a pointer of Git Xet, DVC or git-annex", "fetch the weights themselves (git xet, dvc pull, git annex get)"
        )
    if text.startswith(b"<?xml") and b"<net " in text:
        return Stranger("OpenVINO, a program", _ORIGINAL)
    if text.startswith(b"<"):
        return Stranger("an HTML or XML page, probably an error message saved as weights", _AGAIN)
    if text.startswith(b"{") and re.search(rb'"magic"\s*:\s*"pir"', text[:100]):
        return _PADDLE_PROGRAM
    if text.startswith((b"{", b"[")) and b"\0" not in head:
        return Stranger("JSON text, probably an error message saved as weights", _AGAIN)
    for offset, mark, stranger in _HEADS:
        if head[offset : offset + len(mark)] == mark:
            return stranger
    if re.match(rb"\0{16}[\x04-\x40]\0{3}\x08[\0-\x20]", head):  # a version, no levels of detail, a version, a type
        return _PADDLE_PROGRAM
    return _protobuf(head, suffix)


def _protobuf(head: bytes, suffix: str) -> Stranger | None:
    """ONNX begins with a version and its producer's name, mindspore with a named tensor of a type."""
    if re.match(rb"\x08[\x01-\x20]\x12[\x01-\x40][ -~]", head):
        producer = head[4 : 4 + head[3]].decode("latin-1")
        return Stranger(f"ONNX, a program written by {printable(producer, 60)}", _ORIGINAL)
    if suffix == ".onnx":
        return Stranger("ONNX, a program", _ORIGINAL)
    if head[:1] == b"\x0a" and re.search(rb"\x12.{1,40}\x12[\x04-\x0a](B?Float|Int|UInt)\d+", head, re.DOTALL):
        way = 'mindspore.save_checkpoint(mindspore.load_checkpoint(FILE), "NEW", format="safetensors")'
        return Stranger("a checkpoint of mindspore", f"save it there by {way}")
    return None


# Records of a zip archive, behind its first folder or not.
_RECORDS: tuple[tuple[str, Stranger], ...] = (
    (r"constants\.pkl",
     Stranger("a TorchScript program", "torch.save(torch.jit.load(FILE).state_dict(), NEW) keeps its weights")),
    (r"archive_format|serialized_exported_program\.json|models/.*\.json",
     Stranger("a program of torch.export (.pt2)", "torch.save(torch.export.load(FILE).state_dict, NEW) keeps them")),
    (r"\.data/extern_modules", Stranger("a package of torch.package", "load it, and save the model's state_dict()")),
    (r"model\.weights\.npz", Stranger("a .keras archive with weights of NumPy", f"{_KERAS}, in HDF5")),
    (r".*\.npy",
     Stranger("an .npz archive of NumPy", "safetensors.numpy.save_file(dict(numpy.load(FILE)), NEW) keeps it")),
    (r"Data/com\.apple\.CoreML/.*|Manifest\.json", Stranger("a Core ML package", _ORIGINAL)),
    (r"MAR-INF/.*", Stranger("a model archive of TorchServe", _UNPACK)),
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
    return Stranger(f"a zip archive of {len(records)} files without data.pkl ({listed})", _UNPACK)


def of_entries(entries: Iterable[object], names: Collection[str]) -> Stranger | None:
    """Returns what a dict from a pickle is by its keys.

    Args:
        names: the file's names that no checkpoint needs.
    """
    keys = {key for key in entries if isinstance(key, str)}
    by_paddle = MARK in keys and bool({"LR_Scheduler", "master_weights"} & keys)
    if by_paddle or any(_PADDLE_MOMENT.search(key) for key in keys):
        return _PADDLE_OPTIMIZER
    if {"zero_stage"} & keys or {"optimizer_state_dict", "ds_config"} <= keys:
        return _ZERO
    if {"state", "param_groups"} <= keys:
        return Stranger("the state of an optimizer, no weights", _BESIDE)
    if {"base_lrs", "last_epoch"} <= keys or {"_step_count", "last_epoch"} <= keys:
        return Stranger("the state of a learning rate schedule, no weights", _BESIDE)
    if {"random_state", "numpy_random_seed"} <= keys or {"python", "numpy", "cpu"} <= keys:  # accelerate, the Trainer
        return Stranger("the state of random numbers, no weights", _BESIDE)
    if any(name.startswith("transformers.training_args") for name in names):
        return Stranger("the settings of transformers' Trainer, no weights", _BESIDE)
    return None


_PADDLE_MOMENT = re.compile(r"_(moment\d?|velocity|beta\d_pow_acc|mean_square|mean_grad|inf_norm)_\d+$")

_ZERO = Stranger(
    "a part of DeepSpeed's ZeRO state, whose weights are spread over all of its files",
    "python zero_to_fp32.py CHECKPOINT_DIRECTORY OUTPUT, which DeepSpeed puts beside it, joins them",
)


def sharded_by_zero(shapes: Iterable[tuple[int, ...]], entries: Mapping[object, object]) -> Stranger | None:
    """Returns ZeRO's third stage, in which a model's tensors are left empty; `shapes` are those of the tensors."""
    told = {"ds_version", "ds_config", "param_shapes"} & {key for key in entries if isinstance(key, str)}
    return _ZERO if told and all(0 in shape for shape in shapes) else None


# Files of a folder.
_FILES: tuple[tuple[str, Stranger], ...] = (
    (r"saved_model\.pb", Stranger("a SavedModel of TensorFlow", _KERAS)),
    (r".*\.(pdmodel|pdiparams)", _PADDLE_PROGRAM),
    (r"\d+\.metadata|\d+_\d+\.distcp", _PADDLE_PARTS),
    (r"zero_to_fp32\.py|zero_pp_rank_.*|.*_optim_states\.pt|global_step\d+", _ZERO),
    (r".*\.ckpt\.index|.*\.data-\d{5}-of-\d{5}",
     Stranger("a checkpoint of TensorFlow", "load it there, and save its model")),
    (r"manifest\.ocdbt|_CHECKPOINT_METADATA",
     Stranger("a checkpoint of Orbax", "restore it, and save its parameters by safetensors")),
    (r".*\.(incomplete|crdownload|part|download)", Stranger("half a download", _AGAIN)),
    (r".*\.onnx", Stranger("an ONNX program", _ORIGINAL)),
    (r".*\.gguf", Stranger("GGUF, of ggml", _ORIGINAL)),
    (r".*\.tflite", Stranger("TFLite, a program of TensorFlow Lite", _ORIGINAL)),
    (r".*\.mlmodel|.*\.mlpackage", Stranger("a Core ML model", _ORIGINAL)),
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
        return Stranger("half a download, as its name says", _AGAIN)
    if file.endswith((".onnx.data", ".onnx_data")):
        return Stranger("the numbers of an ONNX program", _ORIGINAL)
    if file.endswith((".pdmodel", ".pdiparams", ".pdiparams.info")):
        return _PADDLE_PROGRAM
    if file.endswith(".pdopt"):
        return _PADDLE_OPTIMIZER
    if file.endswith((".pdstates", ".pdscaler")):
        return Stranger("the settings of a training in Paddle, no weights", "give the .pdparams beside it")
    if file == "saved_model.pb":
        return Stranger("the program of a SavedModel of TensorFlow", _KERAS)
    if re.fullmatch(r".+\.(index|data-\d{5}-of-\d{5})", file):
        return Stranger("a part of a checkpoint of TensorFlow", f"load all of it there: {_KERAS}")
    if file.endswith(".weights.json"):
        return Stranger("the index of Keras' weights in several files", _KERAS)
    if re.fullmatch(r"\d+_\d+\.distcp", file):
        return _PADDLE_PARTS
    if file.endswith(".distcp"):
        return Stranger("a part of a checkpoint of torch.distributed.checkpoint", "give its directory")
    return None


_BEFORE = "convert the checkpoint from before"
# transformers 5.23 writes no model that it has dequantised by save_pretrained; what these write is read.
_SAVED = "'NEW/pytorch_model.bin') with its config.json beside it"
_DEQUANTISED = (
    f"load it there, and torch.save({{n: t.dequantize() for n, t in model.state_dict().items()}}, {_SAVED} writes the "
    f"numbers, rounded as they are; or {_BEFORE}"
)
_BY_MODULES = _DEQUANTISED.replace("load it there", "load it there, call model.dequantize()")
_BY_PARAMETERS = _DEQUANTISED.replace("state_dict().items()", "named_parameters()")

# Libraries that quantise, by the tensors that they add or put in the place of a weight.
_QUANTISERS: Mapping[str, tuple[str, str]] = {
    r"\.(SCB|weight_format|(nested_)?(absmax|quant_map)|quant_state\..+)$": ("bitsandbytes", _BY_MODULES),
    r"[._]weight_(qdata|zero_point|packed_weight)$|:_data$": ("torchao", _DEQUANTISED),
    r"\.weight\._(data|scale|shift|zeropoint)$": ("quanto", _BY_PARAMETERS),
    r"\.(qweight|qzeros|g_idx)$": ("GPTQ or AWQ", _BEFORE),
    r"\.W_q$": ("HQQ", _BEFORE),
    r"\.codebooks$": ("AQLM", _BEFORE),
    r"\.tables2$": ("HIGGS (FLUTE)", _BEFORE),
    r"\.weight_blocks$": ("MXFP4", _BEFORE),
    r"\.weight_scales$": ("EETQ", _BEFORE),
    r"\.(weight_fake_quant|activation_post_process)\.": ("PyTorch's quantisation-aware training", _BEFORE),
    r"\.weight_(packed|scale|shape|scale_inv)$": ("compressed-tensors (fp8, fp4, int8)", _BEFORE),
    r"\.(input_scale|weight_block_scale|_amax)$": ("ModelOpt (fp8, fp4)", _BEFORE),
}

# Weights of a block that PyTorch computes from other tensors, by these tensors: by what, and what makes plain ones. The
# heads of DINO and iBOT have such weights too, which are left out.
_BLOCK = r"(^|\.)(blocks?|layers?)\.\d+\..*\."
_SAVE = "for every module that has them, and save its state_dict() again"
_COMPUTED: Mapping[str, tuple[str, str]] = {
    _BLOCK + r"(weight|bias)_orig$": (
        "torch.nn.utils.prune",
        f"call torch.nn.utils.prune.remove(module, NAME) {_SAVE}",
    ),
    _BLOCK + r"weight_[gv]$": (
        "torch.nn.utils.weight_norm",
        f"call torch.nn.utils.remove_weight_norm(module) {_SAVE}",
    ),
    _BLOCK + r"parametrizations\.\w+\.original\d*$": (
        "torch.nn.utils.parametrize",
        f"call torch.nn.utils.parametrize.remove_parametrizations(module, NAME) {_SAVE}",
    ),
    r"(^|\.)_?flat_param(_\d+)?$": (
        "FSDP, which splits flat ones among its processes",
        "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
        "full_state_dict=True)) gives whole ones in these processes; save that",
    ),
}

# Its blocks are called as BEiT's are, and stand within stages.
_SWIN = (
    r"(^|\.)layers\.0\.blocks\.0\.(attn\.(relative_position_bias_table|logit_scale)|attention\.self\.query\.weight)$"
)

# Models that are no BEiT, by names of their tensors, whatever stands before them.
_MODELS: Mapping[str, Stranger] = {
    r"blocks\.0\.mlp\.(fc1_g|w1|w12)\.weight$": Stranger("EVA-02, a relative of BEiT with a gated MLP", _NOTHING),
    r"(pixel_decoder|transformer_decoder|pixel_level_module|transformer_module)\.": Stranger(
        "Mask2Former, whose heads nothing here computes", "--weights NAME takes an encoder that stands under a name"
    ),
    r"blocks\.0\.attn\.qkv\.bias$": Stranger("a ViT without the weights of its attention", _NOTHING),
    r"^\w+_\d+\.[wb]_\d+$": Stranger(
        "weights of Paddle by the names of a program (paddle.static.save)",
        "with their model in Paddle, model.set_state_dict(paddle.load(FILE), use_structured_name=False) and "
        "paddle.save(model.state_dict(), 'NEW.pdparams') write them by the names of its layers",
    ),
    r"^_?layers/\w+/vars/\d+$": Stranger("weights of Keras whose layers are numbered and have no names", _KERAS),
    r"resblocks\.0\.attn\.in_proj_weight$": Stranger("CLIP of OpenAI or open_clip", _NOTHING),
    r"(^|\.)vision_model\.encoder\.layers\.0\.": Stranger("CLIP or SigLIP of transformers", _NOTHING),
    _SWIN: Stranger("Swin, whose attention is within windows", _NOTHING),
    r"(^|\.)embeddings\.register_tokens$": Stranger("DINOv2 or DINOv3 with registers, of transformers", _NOTHING),
    r"\.attn\.rel_pos_h$": Stranger("SAM or ViTDet, whose positions are relative in each direction", _NOTHING),
    r"(^|\.)embeddings\.(class_embedding|patch_embedding\.weight)$": Stranger(
        "CLIP or SigLIP of transformers", _NOTHING
    ),
    r"(^|\.)block\.0\.0\.attention\.self\.query\.weight$": Stranger("SegFormer of transformers", _NOTHING),
    r"\.(conv_dw|dwconv)\.weight$": Stranger("ConvNeXt, or another model of depthwise convolutions", _NOTHING),
    r"(^|\.)layer1\.0\.conv1\.weight$": Stranger("a ResNet", _NOTHING),
    r"layer\.0\.attention\.self\.query\.weight$": Stranger(
        "a model of BERT's kind (BERT, RoBERTa, LayoutLM) of transformers", _NOTHING
    ),
    r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)$": Stranger(
        "the state of an optimizer, no weights", "give the model's file"
    ),
}


def of_names(names: Collection[str]) -> Stranger | None:
    """Returns what a model, or the form of its weights, is by names of tensors; None if no mark tells it."""
    return quantised(names) or next((s for pattern, s in _MODELS.items() if _any(pattern, names)), None)


def certainly_of_names(names: Collection[str]) -> Stranger | None:
    """Returns what a model is that has names of BEiT's blocks among its own, and is told before these are asked."""
    return quantised(names) or (_MODELS[_SWIN] if _any(_SWIN, names) else None)


def quantised(names: Collection[str]) -> Stranger | None:
    """Returns how weights are quantised or computed, by names of tensors; None where they are plain."""
    for pattern, (library, way) in _QUANTISERS.items():
        if _any(pattern, names):
            return Stranger(f"its weights are quantised by {library}", way)
    for pattern, (by, way) in _COMPUTED.items():
        if _any(pattern, names):
            return Stranger(f"its weights are computed from other tensors by {by}", way)
    return None


def _any(pattern: str, names: Collection[str]) -> bool:
    search: Callable[[str], object] = re.compile(pattern).search
    return any(search(name) for name in names)
