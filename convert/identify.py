"""What model a checkpoint is: from its ``config.json`` where it has one, else from the names and shapes of its tensors.

Three kinds of directories are known: Hugging Face's (``model_type``), timm's (``architecture`` and ``pretrained_cfg``),
and none: the original files come bare.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from beit_jax.config import BeitConfig, PresetName, hf_notes
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR, Source
from beit_jax.images.processor import HALF, ImageProcessor, ade20k_processor, preset
from beit_jax.json_file import Fields, read_json
from beit_jax.variants import VARIANTS

from .files.checkpoint import Checkpoint, TensorInfo
from .formats.mmseg import describe
from .formats.tables import MMSEG, UNILM, Naming

HEAD_DIM = 64  # of every published model; says how many heads there are where no table does


@dataclass(frozen=True)
class Identity:
    """What was recognised.

    Attributes:
        config: the model as it lies in the file, before any resizing.
        seen: for people, how each part was known.
    """

    config: BeitConfig
    processor: ImageProcessor
    seen: tuple[str, ...]


def identify(
    source: Source,
    checkpoint: Checkpoint,
    naming: Naming,
    prefix: str,
    *,
    variant: str | None = None,
    image_preset: PresetName | None = None,
) -> Identity:
    """Recognises a checkpoint.

    Args:
        variant: a row of `VARIANTS` to use instead of ``config.json`` and of guesses.
        image_preset: instead of what the source says about images.

    Raises:
        BeitJaxError: another family, an unknown variant, or names that leave the model open.
    """
    tensors = {name.removeprefix(prefix): info for name, info in checkpoint.tensors.items() if name.startswith(prefix)}
    path = source.directory / CONFIG
    if variant is not None:
        if variant not in VARIANTS:
            raise BeitJaxError(f"--variant {printable(variant)}: expected one of {', '.join(VARIANTS)}")
        known = _Found(VARIANTS[variant], ("the variant that was named",))
    elif naming is UNILM and not path.exists():
        known = _from_tensors(tensors, checkpoint, str(source.path))
    elif naming is MMSEG and not path.exists():
        known = _from_mmseg(checkpoint, str(source.path))
    else:
        raw = read_json(path)
        if "architecture" in raw and "model_type" not in raw:
            known = _from_timm(raw, tensors, checkpoint, str(path))
        else:
            known = _from_hf(raw, checkpoint, prefix, prefix in naming.hosts, str(path))
            if naming is MMSEG and "feature_taps" not in raw.get("beit_jax", {}):
                known = replace(known, config=replace(known.config, feature_taps="original"))
    processor, seen = _processor(source, known, image_preset)
    return Identity(known.config, processor, (*known.seen, *seen))


@dataclass(frozen=True)
class _Found:
    config: BeitConfig
    seen: tuple[str, ...]
    processor: ImageProcessor | None = None


def _from_hf(raw: dict[str, Any], checkpoint: Checkpoint, prefix: str, hosted: bool, file: str) -> _Found:
    notes = tuple(hf_notes(raw, file=file))
    if hosted:  # a DPT or ZoeDepth model: the encoder is described inside
        raw = Fields(raw, file).typed("backbone_config", dict, {}) | {"architectures": None}
    names = checkpoint.tensors.keys()
    if not raw.get("architectures"):
        family = "Data2VecVision" if raw.get("model_type") == "data2vec-vision" else "Beit"
        separator = "/" if "/" in prefix else "."
        heads = {
            "classifier": "ForImageClassification",
            "lm_head": "ForMaskedImageModeling",
            "decode_head": "ForSemanticSegmentation",
        }
        found = [kind for head, kind in heads.items() if any(name.startswith(head + separator) for name in names)]
        raw = raw | {"architectures": [family + (found[0] if found and not hosted else "Model")]}
    config = BeitConfig.from_hf(raw, file=file)
    # Only names can tell whether a bare encoder that pools the mean was saved with its pooling layer.
    if config.task == "features" and config.pooling == "mean":
        config = replace(config, add_pooling_layer=any(name.startswith(f"{prefix}pooler") for name in names))
    return _Found(config, notes)


def _from_mmseg(checkpoint: Checkpoint, file: str) -> _Found:
    config = describe(checkpoint.tensors, checkpoint.metadata, file)
    seen = ("mmseg's UperNet by the names and shapes of the tensors, images as it was trained",)
    return _Found(config, seen, ade20k_processor(config.image_size[0]))


def _from_timm(raw: dict[str, Any], tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, file: str) -> _Found:
    """A timm directory as the hub has them: the tensors say the model, ``pretrained_cfg`` the images."""
    found = _from_tensors(tensors, checkpoint, file)
    images = Fields(Fields(raw, file).typed("pretrained_cfg", dict, {}), f"{file}: pretrained_cfg")
    images.choice("interpolation", ("bicubic",), "bicubic")
    images.choice("crop_mode", ("center",), "center")
    mean, std = (tuple(images.content.get(key, HALF)) for key in ("mean", "std"))
    crop_pct = images.typed("crop_pct", float, 0.9)
    processor = preset("timm", found.config.image_size, mean=mean, std=std, crop_pct=crop_pct)
    labels = raw.get("label_names")
    config = replace(found.config, position_resize="geometric_linear")
    if isinstance(labels, list) and len(labels) == config.num_labels:
        config = replace(config, labels=tuple(map(str, labels)))
    seen = (f"timm's {printable(raw['architecture'])}, images by its pretrained_cfg", *found.seen)
    return _Found(config, seen, processor)


def _from_tensors(tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, file: str) -> _Found:
    """The model that names and shapes of the original naming leave no doubt about, and what they do not say, said.

    Source: microsoft/unilm@768a3c8 beit/modeling_pretrain.py and modeling_finetune.py;
    facebookresearch/data2vec_vision@af9a363 beit/modeling_cyclical.py.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise BeitJaxError(f"{file}: no tensor {name}; without it the model cannot be recognised: pass --variant")
        return tensors[name].shape

    seen = []
    hidden, channels, *patch = shape("patch_embed.proj.weight")
    shared, layer = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    table = next((tensors[name].shape for name in (shared, layer) if name in tensors), None)
    heads = table[1] if table else hidden // HEAD_DIM
    if not table and hidden % HEAD_DIM:
        raise BeitJaxError(f"{file}: nothing in it tells the number of attention heads; pass --variant")
    if not table:
        seen.append(f"{heads} heads: of {HEAD_DIM} channels, as in every published model")
    grid = _grid(table, tensors, file)
    if grid is None:
        seen.append("image size 224: nothing in the file says it")
    side = grid or 224 // patch[0]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    known = checkpoint.tensors
    task, labels, vocabulary = "features", 0, 8192
    if "lm_head.weight" in known:
        task, vocabulary = "masked_image_modeling", known["lm_head.weight"].shape[0]
        seen.append(f"masked image modelling: lm_head of {vocabulary}")
    elif "head.weight" in known:
        task, labels = "image_classification", known["head.weight"].shape[0]
        seen.append(f"classification: head of {labels}")
    regression = task == "masked_image_modeling" and vocabulary == hidden
    if regression:
        seen.append("data2vec: its head predicts features of the encoder's own width")
    gamma = "blocks.0.gamma_1" in tensors
    config = BeitConfig(
        model_type="data2vec-vision" if regression else "beit",
        task=task,  # type: ignore[arg-type]
        image_size=(side * patch[0], side * patch[1]),
        patch_size=(patch[0], patch[1]),
        num_channels=channels,
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=shape("blocks.0.mlp.fc1.weight")[0],
        layer_norm_eps=1e-6,
        pooling="cls" if "norm.weight" in tensors and task != "masked_image_modeling" else "mean",
        add_pooling_layer="fc_norm.weight" in tensors,
        position_bias={(0, 0): "none", (1, 0): "shared", (0, 1): "per_layer", (1, 1): "both"}[  # type: ignore[arg-type]
            shared in tensors, layer in tensors
        ],
        position_resize="geometric",
        use_absolute_position_embeddings="pos_embed" in tensors,
        use_mask_token="mask_token" in tensors,
        # Only an initial value, which trained weights have left behind: that of the published models of this size.
        layer_scale_init_value=(0.1 if hidden <= 768 else 1e-5) if gamma else 0.0,
        vocab_size=vocabulary,
        labels=tuple(f"LABEL_{i}" for i in range(labels)),
    )
    return _Found(config, ("names and shapes of the tensors", *seen))


def _grid(table: tuple[int, ...] | None, tensors: Mapping[str, TensorInfo], file: str) -> int | None:
    """Patches a side, from the rows of a bias table or the number of absolute positions; None if there is neither."""
    if table:
        side = ((table[0] - 3) ** 0.5 + 1) / 2
    elif "pos_embed" in tensors:
        side = (tensors["pos_embed"].shape[1] - 1) ** 0.5
    else:
        return None
    if not side.is_integer():
        raise BeitJaxError(f"{file}: its positions are not of a square grid; pass --variant, or give it a config.json")
    return int(side)


def _processor(source: Source, found: _Found, wanted: PresetName | None) -> tuple[ImageProcessor, tuple[str, ...]]:
    path = source.directory / PROCESSOR
    size = found.config.image_size
    if wanted is not None:
        return preset(wanted, size), (f"images by the preset {wanted}",)
    if found.processor is not None:
        return found.processor, ()
    if path.exists():
        return ImageProcessor.from_file(path), ()
    name: PresetName = "hf" if found.config.position_resize == "bilinear" else "unilm_eval"
    processor = preset(name, size)
    if name == "hf" and found.config.task == "semantic_segmentation":
        processor = replace(processor, resample="bicubic")
    return processor, (f"{path}: no such file; images will be prepared by the preset {name}: {processor.describe()}",)
