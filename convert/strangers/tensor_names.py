"""Weights that are quantised or computed from others, and other models, by names of tensors."""

import re
from collections.abc import Callable, Collection, Mapping

from .kind import KERAS, NOTHING, Stranger

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
    r"blocks\.0\.mlp\.(fc1_g|w1|w12)\.weight$": Stranger("EVA-02, a relative of BEiT with a gated MLP", NOTHING),
    r"(pixel_decoder|transformer_decoder|pixel_level_module|transformer_module)\.": Stranger(
        "Mask2Former, whose heads nothing here computes", "--weights NAME takes an encoder that stands under a name"
    ),
    r"blocks\.0\.attn\.qkv\.bias$": Stranger("a ViT without the weights of its attention", NOTHING),
    r"^\w+_\d+\.[wb]_\d+$": Stranger(
        "weights of Paddle by the names of a program (paddle.static.save)",
        "with their model in Paddle, model.set_state_dict(paddle.load(FILE), use_structured_name=False) and "
        "paddle.save(model.state_dict(), 'NEW.pdparams') write them by the names of its layers",
    ),
    r"^_?layers/\w+/vars/\d+$": Stranger("weights of Keras whose layers are numbered and have no names", KERAS),
    r"resblocks\.0\.attn\.in_proj_weight$": Stranger("CLIP of OpenAI or open_clip", NOTHING),
    r"(^|\.)vision_model\.encoder\.layers\.0\.": Stranger("CLIP or SigLIP of transformers", NOTHING),
    _SWIN: Stranger("Swin, whose attention is within windows", NOTHING),
    r"(^|\.)embeddings\.register_tokens$": Stranger("DINOv2 or DINOv3 with registers, of transformers", NOTHING),
    r"\.attn\.rel_pos_h$": Stranger("SAM or ViTDet, whose positions are relative in each direction", NOTHING),
    r"(^|\.)embeddings\.(class_embedding|patch_embedding\.weight)$": Stranger(
        "CLIP or SigLIP of transformers", NOTHING
    ),
    r"(^|\.)block\.0\.0\.attention\.self\.query\.weight$": Stranger("SegFormer of transformers", NOTHING),
    r"\.(conv_dw|dwconv)\.weight$": Stranger("ConvNeXt, or another model of depthwise convolutions", NOTHING),
    r"(^|\.)layer1\.0\.conv1\.weight$": Stranger("a ResNet", NOTHING),
    r"layer\.0\.attention\.self\.query\.weight$": Stranger(
        "a model of BERT's kind (BERT, RoBERTa, LayoutLM) of transformers", NOTHING
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
