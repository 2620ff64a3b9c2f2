"""What is no weights of BEiT is told in one line: what it is, which program made it, and the way to weights."""

import bz2
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beit_jax.cli.main import main

Write = Callable[[Path], Any]


def content(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def archive(*records: str) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for record in records:
                made.writestr(record, b"x" * 100)

    return write


def array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


def paddle(*names: str, mark: bool = True, **entries: Any) -> Write:
    """What paddle.save writes: a pickle of arrays, and of their names in its program."""
    content = {**{name: np.ones((1, 1, 2), np.float32) for name in names}, **entries}
    table = {"StructuredToParameterName@@": {name: name for name in names}} if mark else {}
    return lambda path: path.write_bytes(pickle.dumps(content | table, 4)) and None


# The first bytes of what paddle.jit.save of paddle 3.3.1 writes, which were looked at.
PIR = b'{"base_code":{"magic":"pir","trainable":true,"version":4},"program":{"regions":[]}}'
PDIPARAMS = bytes(16) + b"\x04\0\0\0\x08\x05\x10\x10" + bytes(64)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as made:
        made.addfile(tarfile.TarInfo("weights"), io.BytesIO())


def saved(**entries: Any) -> Write:
    return lambda path: torch.save(entries, path)


class Square(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(Square(), torch.ones(2)), path)


def optimizer(path: Path) -> None:
    torch.save(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1, momentum=0.9).state_dict(), path)


def schedule(path: Path) -> None:
    moved = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    torch.save(torch.optim.lr_scheduler.StepLR(moved, 3).state_dict(), path)


ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x062.13.0" + bytes(600)
MINDSPORE = b"\n\x2e\n\x10backbone.cls_tok\x12\x1a\x08\x01\x12\x07Float32\x1a\x0d" + bytes(600)
ZERO = {"ds_config": {}, "ds_version": "0.18.2"}

FILES: dict[str, tuple[str, Write, tuple[str, ...]]] = {
    "ONNX": ("model.onnx", content(ONNX), ("ONNX, a program written by pytorch", "made of")),
    "ONNX under another name": ("model.bin", content(ONNX), ("ONNX", "made of")),
    "TFLite": ("model.tflite", content(b"\x1c\0\0\0TFL3" + bytes(600)), ("TFLite", "made of")),
    "GGUF": ("model.gguf", content(b"GGUF\3\0\0\0" + bytes(600)), ("GGUF", "ggml", "made of")),
    "mindspore": ("beit.ckpt", content(MINDSPORE), ("mindspore", 'format="safetensors"')),
    "one array": ("model.bin", array, ("one array of NumPy",)),
    "npz": ("model.bin", arrays, ("npz", "safetensors.numpy.save_file")),
    "tar": ("model.pth", tar, ("a tar archive", "unpack")),
    "xz": ("model.pth", content(lzma.compress(b"x" * 99)), ("xz", "unpack")),
    "bzip2": ("model.pth", content(bz2.compress(b"x" * 99)), ("bzip2", "unpack")),
    "zip": ("model.pth", archive("beit/config.json", "beit/model.safetensors"), ("zip archive of 2 files", "unpack")),
    ".keras with NumPy's weights": ("model.keras", archive("metadata.json", "config.json", "model.weights.npz"),
                                    ("weights of NumPy", "model.save('NEW.keras')")),
    "Keras' weights in shards": ("beit.weights.json", content(b"{}"), ("several files", "model.save('NEW.keras')")),
    "part of a checkpoint of TensorFlow": ("model.data-00000-of-00001", content(bytes(600)),
                                           ("a checkpoint of TensorFlow", "model.save('NEW.keras')")),
    "SavedModel's program": ("saved_model.pb", content(bytes(600)), ("SavedModel", "model.save('NEW.keras')")),
    "TorchScript": ("model.pt", script, ("TorchScript", "torch.jit.load", "state_dict")),
    "torch.export": ("model.pt2", archive("m/archive_format", "m/models/model.json"), ("torch.export.load",)),
    "optimizer": ("optimizer.pt", optimizer, ("state of an optimizer", "give the model")),
    "schedule": ("scheduler.pt", schedule, ("learning rate schedule", "give the model")),
    "random numbers": ("rng_state.pth", saved(python=(3, (1,)), numpy=np.random.default_rng(0), cpu=torch.ones(1)),
                       ("state of random numbers", "give the model")),
    "ZeRO, optimizer": ("zero_pp_rank_0_mp_rank_00_optim_states.pt", saved(optimizer_state_dict={}, **ZERO),
                        ("DeepSpeed's ZeRO", "zero_to_fp32.py")),
    "ZeRO, stage 3": ("zero_pp_rank_0_mp_rank_00_model_states.pt",
                      saved(module={"blocks.0.attn.qkv.weight": torch.ones(0)}, param_shapes=[], **ZERO),
                      ("DeepSpeed's ZeRO", "zero_to_fp32.py")),
    "Paddle's optimizer": ("beit.pdopt", content(b"x"), ("state of an optimizer of Paddle", "give the .pdparams")),
    "Paddle's optimizer under another name": (
        "beit.bin", paddle("linear_0.w_0_moment1_0", "linear_0.w_0_beta1_pow_acc_0"), ("optimizer of Paddle",)),
    "Paddle's SGD": ("beit.bin", paddle(LR_Scheduler={"last_lr": 0.1}), ("optimizer of Paddle",)),
    "Paddle's settings": ("latest.pdstates", content(b"x"), ("settings of a training in Paddle", "give the .pdparams")),
    "Paddle's program": ("inference.pdmodel", content(b"x"), ("paddle.jit.save", "paddle.save(model.state_dict()")),
    "Paddle's program of version 3": ("inference.json", content(PIR), ("paddle.jit.save", "no names", ".pdparams")),
    "Paddle's numbered weights": ("inference.pdiparams", content(PDIPARAMS), ("paddle.jit.save", ".pdparams")),
    "Paddle's numbered weights under another name": ("x.bin", content(PDIPARAMS), ("paddle.jit.save", ".pdparams")),
    "part of Paddle's distributed checkpoint": (
        "0_0.distcp", content(b"x"), ("paddle.distributed", "load_merged_state_dict")),
    "paddle.static.save": (
        "x.pdparams", paddle("vision_transformer_0.w_0", "linear_0.b_0", mark=False),
        ("paddle.static.save", "use_structured_name=False")),
    "OpenVINO": ("openvino_model.xml", content(b'<?xml version="1.0"?>\n<net name="Model0" version="11">' + bytes(600)),
                 ("OpenVINO", "made of")),
    "an ONNX program's numbers": ("model.onnx.data", content(bytes(600)), ("ONNX", "made of")),
    "zeros": ("model.safetensors", content(b"\0" * 5000), ("not finished", "download it again")),
    "DVC": ("x.pth", content(b"outs:\n- md5: aa\n  path: x.pth\n"), ("pointer", "dvc pull")),
    "half a download": ("model.safetensors.incomplete", content(b"x"), ("half a download", "download it again")),
    "part of a distributed checkpoint": ("__0_0.distcp", saved(a=torch.ones(1)), ("give its directory",)),
    "JPEG": ("model.bin", content(b"\xff\xd8\xff\xe0" + bytes(600)), ("a JPEG image",)),
}  # fmt: skip


def told(path: Path, needles: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ")
    assert all(needle in message.replace(str(path), "") for needle in needles), message
    assert not any(word in message for word in ("damaged", "correct config.json", "Traceback")), message
    return message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "write", "needles"), FILES.values(), ids=FILES)
def test_files(
    name: str, write: Write, needles: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / name)
    told(tmp_path / name, needles, capsys)


FOLDERS = {
    "SavedModel": (("saved_model.pb", "variables"), ("SavedModel of TensorFlow",)),
    "DeepSpeed": (("global_step10", "latest", "zero_to_fp32.py"), ("ZeRO", "python zero_to_fp32.py")),
    "TensorFlow's checkpoint": (("checkpoint", "model.ckpt.index"), ("checkpoint of TensorFlow",)),
    "Orbax": (("_CHECKPOINT_METADATA", "manifest.ocdbt"), ("Orbax",)),
    "half a download": (("model.safetensors.incomplete", "config.json"), ("half a download",)),
    "Paddle's program": (("inference.json", "inference.pdiparams"), ("paddle.jit.save", ".pdparams")),
    "Paddle's distributed checkpoint": (("0.metadata", "0_0.distcp"), ("paddle.distributed", "load_merged_state_dict")),
    "ONNX": (("model.onnx", "config.json"), ("ONNX", "made of")),
    "training state alone": (("optimizer.pt", "scheduler.pt"), ("training state without its model",)),
}


@pytest.mark.parametrize(("files", "needles"), FOLDERS.values(), ids=FOLDERS)
def test_folders(
    files: tuple[str, ...], needles: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    told(tmp_path, needles, capsys)


ONE = torch.ones(1)
Q_PROJ = "beit.encoder.layer.0.attention.attention.query"
_OF_VIT = {f"vit.encoder.layer.0.attention.attention.{name}": ONE for name in ("query.weight", "key.bias")}
TENSORS = {
    "bitsandbytes": ({f"{Q_PROJ}.weight": ONE.to(torch.int8), f"{Q_PROJ}.SCB": ONE}, ("bitsandbytes", "dequantize")),
    "bitsandbytes, 4 bits": (
        {"x.weight.absmax": ONE, "x.weight.quant_state.bitsandbytes__nf4": ONE},
        ("bitsandbytes",),
    ),
    "torchao": ({f"{Q_PROJ}._weight_qdata": ONE, f"{Q_PROJ}._weight_scale": ONE}, ("torchao", "dequantize")),
    "quanto": ({f"{Q_PROJ}.weight._data": ONE, f"{Q_PROJ}.weight._scale": ONE}, ("quanto",)),
    "GPTQ": ({"x.qweight": ONE, "x.qzeros": ONE, "x.scales": ONE}, ("GPTQ or AWQ", "checkpoint from before")),
    "HQQ": ({"x.W_q": ONE}, ("HQQ",)),
    "AQLM": ({"x.codes": ONE, "x.codebooks": ONE}, ("AQLM",)),
    "HIGGS": ({"x.tables": ONE, "x.tables2": ONE}, ("HIGGS",)),
    "MXFP4": ({"x.weight_blocks": ONE, "x.weight_scales": ONE}, ("MXFP4",)),
    "EETQ": ({f"{Q_PROJ}.weight": ONE.to(torch.int8), f"{Q_PROJ}.weight_scales": ONE}, ("EETQ",)),
    "QAT": ({f"{Q_PROJ}.weight_fake_quant.scale": ONE}, ("quantisation-aware training",)),
    "pruned": ({f"{Q_PROJ}.weight_orig": ONE, f"{Q_PROJ}.weight_mask": ONE}, ("prune.remove(module, NAME)",)),
    "weight norm": ({f"{Q_PROJ}.weight_g": ONE, f"{Q_PROJ}.weight_v": ONE}, ("remove_weight_norm(module)",)),
    "parametrised": ({f"{Q_PROJ}.parametrizations.weight.original0": ONE}, ("remove_parametrizations(module",)),
    "FSDP": ({"model._flat_param": ONE}, ("FSDP", "full_state_dict=True")),
    "compressed-tensors": ({"x.weight_packed": ONE, "x.weight_scale": ONE}, ("compressed-tensors",)),
    "EVA-02": ({"blocks.0.attn.q_proj.weight": ONE, "blocks.0.mlp.fc1_g.weight": ONE}, ("EVA-02",)),
    "ViT-Adapter": ({"backbone.blocks.0.attn.qkv.weight": ONE, "backbone.level_embed": ONE}, ("ViT-Adapter",)),
    "Mask2Former": ({"decode_head.pixel_decoder.input_convs.0.conv.weight": ONE}, ("Mask2Former",)),
    "DeiT": ({"blocks.0.attn.qkv.bias": ONE, "blocks.0.attn.qkv.weight": ONE}, ("a ViT", "relative of BEiT")),
    "Keras": ({"layers/dense/vars/0": ONE}, ("Keras", "no names", "model.save('NEW.keras')")),
    "Swin": (
        {
            f"layers.{i}.blocks.0.attn.{name}": ONE
            for i in (0, 1)
            for name in ("qkv.weight", "relative_position_bias_table")
        },
        ("Swin",),
    ),
    "Swin v2": (
        {f"layers.{i}.blocks.0.attn.{n}": ONE for i in (0, 1) for n in ("qkv.weight", "logit_scale")},
        ("Swin",),
    ),
    "Swin of transformers": ({"encoder.layers.0.blocks.0.attention.self.query.weight": ONE}, ("Swin",)),
    "ViT of transformers": (
        {**_OF_VIT, "vit.embeddings.cls_token": ONE},
        ("a ViT as transformers", "ViT, MAE and DINOv2", "timm's names"),
    ),
    "DeiT of transformers": (
        {**_OF_VIT, "vit.embeddings.cls_token": ONE, "vit.embeddings.distillation_token": ONE},
        ("a distillation token", "nothing here computes"),
    ),
    "DINOv2 with registers of transformers": (
        {**_OF_VIT, "vit.embeddings.cls_token": ONE, "vit.embeddings.register_tokens": ONE},
        ("register tokens", "nothing here computes"),
    ),
    "I-JEPA of transformers": (_OF_VIT, ("no class token", "nothing here computes")),
    "DINOv3 of transformers": ({"embeddings.register_tokens": ONE}, ("DINOv3 with registers",)),
    "SAM": ({"vision_encoder.layers.0.attn.rel_pos_h": ONE}, ("SAM or ViTDet",)),
    "CLIP": ({"vision_model.embeddings.class_embedding": ONE}, ("CLIP or SigLIP",)),
    "SigLIP": ({"embeddings.patch_embedding.weight": ONE}, ("CLIP or SigLIP",)),
    "SegFormer": ({"segformer.encoder.block.0.0.attention.self.query.weight": ONE}, ("SegFormer",)),
    "ConvNeXt": ({"stages.0.blocks.0.conv_dw.weight": ONE}, ("ConvNeXt",)),
    "ResNet": ({"layer1.0.conv1.weight": ONE}, ("ResNet",)),
    "BERT": ({"encoder.layer.0.attention.self.query.weight": ONE}, ("BERT",)),
    "optimizer": ({"state.x.exp_avg": ONE}, ("state of an optimizer",)),
}


@pytest.mark.parametrize(("tensors", "needles"), TENSORS.values(), ids=TENSORS)
def test_tensors(
    tensors: dict[str, torch.Tensor], needles: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    told(tmp_path / "x.safetensors", needles, capsys)


def test_fp8_is_told_before_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x.weight": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    told(tmp_path / "x.safetensors", ("F8_E4M3 (quantised)", "save it as float32 or bfloat16"), capsys)


def test_a_model_that_its_config_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its tensors are called."""
    save_file({"x.weight": ONE}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "pvt"}')
    told(tmp_path, ("pvt, as its config.json says",), capsys)


def test_a_pickle_of_quantised_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """quantize_dynamic keeps the type of its numbers beside them."""
    torch.save({"head.scale": ONE, "head._packed_params.dtype": torch.qint8}, tmp_path / "x.pth")
    told(tmp_path / "x.pth", ("quantised by PyTorch", "checkpoint from before", "Nothing was run"), capsys)
