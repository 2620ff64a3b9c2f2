"""The original code: unilm's BEiT, BEiT v2 and DiT, and data2vec_vision. timm has the same names.

Source: microsoft/unilm@768a3c8 beit/modeling_pretrain.py and modeling_finetune.py;
facebookresearch/data2vec_vision@af9a363 beit/modeling_cyclical.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields

from .format import Description, Sighting, SourceFormat, default_preset, describe_by_config
from .heads import BASE, LARGE, Size, Statement, all_settings, integer, settle, stated_by_user, stated_in_training
from .rules import CONV, FLAT, FUSED_QKV, LINEAR, Rules, affine, linear, rule
from .writing import write_pth

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

EARLY: Mapping[Size, int] = {BASE: 9, LARGE: 21}
"""The block whose patches the extra blocks of the published BEiT v2 models read."""

BACKBONE: Rules = (
    rule("cls_token", "embeddings/cls_token"),
    rule("mask_token", "embeddings/mask_token"),
    rule("pos_embed", "embeddings/position_embeddings"),
    rule("patch_embed.proj.weight", "embeddings/patch_kernel", CONV),
    rule("patch_embed.proj.bias", "embeddings/patch_bias"),
    rule("rel_pos_bias.relative_position_bias_table", "shared_bias_table"),
    *affine("blocks.{i}.norm1", "blocks/norm1"),
    rule("blocks.{i}.attn.qkv.weight", "blocks/attention/qkv_kernel", FUSED_QKV),
    rule("blocks.{i}.attn.q_bias", "blocks/attention/q_bias", FLAT),
    rule("blocks.{i}.attn.v_bias", "blocks/attention/v_bias", FLAT),
    rule("blocks.{i}.attn.relative_position_bias_table", "blocks/attention/bias_table"),
    rule("blocks.{i}.attn.proj.weight", "blocks/attention/out_kernel", LINEAR),
    rule("blocks.{i}.attn.proj.bias", "blocks/attention/out_bias"),
    rule("blocks.{i}.gamma_1", "blocks/gamma_1"),
    *affine("blocks.{i}.norm2", "blocks/norm2"),
    *linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
    *linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
    rule("blocks.{i}.gamma_2", "blocks/gamma_2"),
    *affine("norm", "norm"),
    *affine("fc_norm", "pooler_norm"),
)
# BEiT v2's extra blocks, which predict the visual tokens from the final class token and early patches.
_AGGREGATION: Rules = tuple(
    replace(
        each, torch=tuple(name.replace("blocks.", "cls_pt_layers.") for name in each.torch),
        flax=f"aggregation/{each.flax}",
    )
    for each in BACKBONE
    if each.stacked
)  # fmt: skip
HEADS: Rules = (
    *affine("norm", "norm"),
    *linear("lm_head", "lm_head"),
    *linear("head", "classifier"),
    *_AGGREGATION,
    *affine("cls_pt_norm", "aggregation/norm"),
    *linear("cls_pt_lm_head", "aggregation/lm_head"),
)


def describe_by_tensors(
    sighting: Sighting,
    *,
    heads: Callable[[Size], Sequence[Statement]] = lambda size: (),
    image_sizes: Sequence[tuple[int, int]] = (),
    origin: str = "",
) -> Description:
    """Describes the model that names and shapes leave no doubt about; says what they do not tell and was assumed.

    Args:
        heads: returns what a configuration states of the number of attention heads.
        image_sizes: pixels, (height, width), as a configuration states them; the first that fits the positions counts.
        origin: that configuration.

    Raises:
        BeitJaxError: a tensor is missing that every model has; the number of heads or the grid of patches is open, or
            stated in contradiction.
    """
    tensors, file = sighting.backbone, sighting.file

    def shape(name: str, axes: int, prefix: str = sighting.prefix) -> tuple[int, ...]:
        found = sighting.tensors[prefix + name].shape if prefix + name in sighting.tensors else None
        if found is None or len(found) != axes or 0 in found:
            raise BeitJaxError(
                f"{file}: {printable(prefix + name)}: expected a tensor of {axes} axes, found "
                f"{'none' if found is None else list(found)}; save the whole model, or download the file again"
            )
        return found

    _refuse_relatives(sighting)
    hidden, channels, *patch = shape("patch_embed.proj.weight", 4)
    size = Size(hidden, _count(tensors, r"blocks\.(\d{1,6})\..*"), shape("blocks.0.mlp.fc1.weight", 2)[0])
    shared, layer = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    tables = [shape(name, 2) for name in (shared, layer) if name in tensors]
    certain = [Statement(table[1], "the position bias table") for table in tables[:1]]
    certain += [*heads(size), *stated_by_user(sighting.num_heads)]
    stated = settle(size, certain, stated_in_training(sighting.metadata, size), file)
    seen = [] if tables else [f"{stated.heads} heads: {stated.where}"]
    positions = shape("pos_embed", 3) if "pos_embed" in tensors else None
    found = _image_size(tables, positions, patch, image_sizes, file)
    if not tables and positions is None and not image_sizes:
        seen.append(f"image size {found[0]}: nothing in the file says it")
    task, labels, vocabulary = "features", 0, 8192
    head_names = sighting.tensors if sighting.has_head else ()  # in another model's file they are that model's
    if "lm_head.weight" in head_names:
        task, vocabulary = "masked_image_modeling", shape("lm_head.weight", 2, "")[0]
        seen.append(f"masked image modelling: lm_head of {vocabulary}")
    elif "head.weight" in head_names:
        task, labels = "image_classification", shape("head.weight", 2, "")[0]
        seen.append(f"classification: head of {labels}")
    regression = task == "masked_image_modeling" and vocabulary == hidden
    if regression:
        seen.append("data2vec: its head predicts features of the encoder's own width")
    early, extra = _aggregation(sighting, size) if task == "masked_image_modeling" else (0, 0)
    own_head = _own_head(sighting, extra)
    seen += _aggregation_seen(early, extra, own_head)
    config = BeitConfig(
        model_type="data2vec-vision" if regression else "beit",
        task=task,  # type: ignore[arg-type]
        image_size=found,
        patch_size=(patch[0], patch[1]),
        num_channels=channels,
        hidden_size=hidden,
        num_hidden_layers=size.depth,
        num_attention_heads=stated.heads,
        intermediate_size=size.intermediate,
        layer_norm_eps=1e-6,
        pooling="cls" if "norm.weight" in tensors and task != "masked_image_modeling" else "mean",
        add_pooling_layer="fc_norm.weight" in tensors,
        position_bias={(0, 0): "none", (1, 0): "shared", (0, 1): "per_layer", (1, 1): "both"}[  # type: ignore[arg-type]
            shared in tensors, layer in tensors
        ],
        position_resize="geometric",
        use_absolute_position_embeddings=positions is not None,
        use_mask_token="mask_token" in tensors,
        # Only an initial value, from which trained weights have moved away: that of the published models of this size.
        layer_scale_init_value=(0.1 if hidden <= 768 else 1e-5) if "blocks.0.gamma_1" in tensors else 0.0,
        vocab_size=vocabulary,
        aggregate_from=early,
        aggregation_layers=extra,
        own_aggregation_head=own_head,
        labels=tuple(f"LABEL_{i}" for i in range(labels)),
    )
    seen = ["names and shapes of the tensors", *seen]
    return Description(config, tuple(seen), image_preset=default_preset(config), origin=origin)


def _count(names: Iterable[str], pattern: str) -> int:
    """The number of different values that the group of a pattern takes."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _image_size(
    tables: Sequence[tuple[int, ...]],
    positions: tuple[int, ...] | None,
    patch: Sequence[int],
    stated: Sequence[tuple[int, int]],
    file: str,
) -> tuple[int, int]:
    """Pixels, (height, width): a stated size that fits the rows of position tables, or that of their square grid."""

    def fits(rows: int, columns: int) -> bool:
        tokens, offsets = rows * columns + 1, (2 * rows - 1) * (2 * columns - 1) + 3
        return all(table[0] == offsets for table in tables) and (positions is None or positions[1] == tokens)

    for height, width in stated:
        if not height % patch[0] and not width % patch[1] and fits(height // patch[0], width // patch[1]):
            return height, width
    if tables:
        side = ((max(tables[0][0] - 3, 0)) ** 0.5 + 1) / 2
    elif positions is not None:
        side = max(positions[1] - 1, 0) ** 0.5
    else:
        side = float(max(1, 224 // max(1, patch[0])))
    if not side.is_integer() or side < 1:
        raise BeitJaxError(
            f"{file}: its positions are not of a square grid; put the model's config.json beside it, which says "
            "image_size as [height, width]"
        )
    return int(side) * patch[0], int(side) * patch[1]


def _refuse_relatives(sighting: Sighting) -> None:
    """Refuses models with the same names for most tensors: no number of heads, and no configuration, makes them BEiT.

    Raises:
        BeitJaxError: names the tensor that BEiT does not have.
    """
    tensors, first = sighting.backbone, "blocks.0."
    shapes = [tensors[n].shape for n in (f"{first}mlp.fc1.weight", f"{first}mlp.fc2.weight") if n in tensors]
    gated = [len(shape) for shape in shapes] == [2, 2] and shapes[0][0] == 2 * shapes[1][1]
    interacts = ("level_embed", "spm.", "interactions.")
    found = {
        "level_embed, spm and interactions: ViT-Adapter, which changes the encoder's states between its blocks": any(
            name.startswith(interacts) for name in tensors
        ),
        f"{first}mlp.fc1.weight: a gated MLP, as in EVA-02": gated,
        f"{first}mlp.fc1_g.weight: a gated MLP, as in DINOv3's larger models": f"{first}mlp.fc1_g.weight" in tensors,
        "reg_token: register tokens, as in DINOv3": "reg_token" in tensors,
        "1792 wide, 15360 in its MLP: EVA-02's enormous model, whose norms follow what BEiT's precede": [*shapes[:1]]
        == [(15360, 1792)],
    }
    for what, is_there in found.items():
        if is_there:
            raise BeitJaxError(f"{sighting.file}: {what}: a relative of BEiT, which nothing here computes")


def refuse_unbiased(sighting: Sighting) -> None:
    """Refuses attention without any bias, and what else is no BEiT.

    Raises:
        BeitJaxError: names the tensors that are missing, or one too many.
    """
    _refuse_relatives(sighting)
    names = [f"blocks.0.attn.{name}" for name in ("q_bias", "qkv.bias")]
    if not any(name in sighting.backbone for name in names):
        raise BeitJaxError(
            f"{sighting.file}: no {' and no '.join(names)}: attention without biases, as in some ViTs: a relative of "
            "BEiT, which nothing here computes"
        )


def _aggregation(sighting: Sighting, size: Size) -> tuple[int, int]:
    """BEiT v2's patch aggregation: the block it reads, and its number of blocks; zeros where it is left out."""
    count = _extra_blocks(sighting)
    if not count or sighting.aggregate_from == 0:
        return 0, 0
    stated = {integer(settings.get("early_layers")) for _, settings in all_settings(sighting.metadata)} - {None}
    early = sighting.aggregate_from or (stated.pop() if len(stated) == 1 else None)
    if early is None and not stated:
        early = EARLY.get(size)
    if early is None or not 0 < early <= size.depth:
        found = " and ".join(str(each) for each in {early, *stated} - {None}) or "nothing"
        raise BeitJaxError(
            f"{sighting.file}: expected the block whose patches its {count} cls_pt_layers read (early_layers, 1 to "
            f"{size.depth}), found {found}: convert it with --aggregate-from N, or with "
            "--aggregate-from 0 to leave them out"
        )
    return early, count


def _aggregation_seen(early: int, extra: int, own: bool) -> list[str]:
    head = ", with a head of their own" if own else ""
    return [f"patch aggregation: {extra} extra blocks read the patches of block {early}{head}"] if extra else []


def _own_head(sighting: Sighting, extra: int) -> bool:
    """True if the extra blocks that are read have a head of their own (``shared_lm_head`` False)."""
    return extra > 0 and any(name.startswith("cls_pt_lm_head.") for name in sighting.tensors)


def _extra_blocks(sighting: Sighting) -> int:
    return _count(sighting.tensors, r"cls_pt_layers\.(\d{1,6})\..*")


def _describe(sighting: Sighting) -> Description:
    if sighting.content is None:
        refuse_unbiased(sighting)
        return describe_by_tensors(sighting)
    found, count = describe_by_config(sighting), _extra_blocks(sighting)
    config, file = found.config, sighting.config_file
    if config.task != "masked_image_modeling" or not count:
        return found
    own = Fields(sighting.content, file).typed("beit_jax", dict, {})
    if "aggregation_layers" not in own:  # transformers has no place for these blocks, and says nothing of them
        size = Size(config.hidden_size, config.num_hidden_layers, config.intermediate_size)
        early, extra = _aggregation(sighting, size)
        own_head = _own_head(sighting, extra)
        config = replace(config, aggregate_from=early, aggregation_layers=extra, own_aggregation_head=own_head)
        return replace(found, config=config, seen=(*found.seen, *_aggregation_seen(early, extra, own_head)))
    if config.aggregation_layers not in (0, count):
        raise BeitJaxError(
            f"{file}: beit_jax: aggregation_layers: expected {count}, as the file has cls_pt_layers, or 0 to leave "
            f"them out, found {config.aggregation_layers}"
        )
    return found


def position_indices(config: BeitConfig) -> dict[str, np.ndarray]:
    """Returns the index buffers that the original's state dicts hold, recomputed."""
    from beit_jax.models.attention import relative_position_index  # which imports JAX, and only an export needs it

    index = relative_position_index(config.grid).astype(np.int64)
    shared = {"rel_pos_bias.relative_position_index": index} if config.has_shared_bias else {}
    prefixes = [f"blocks.{i}." for i in range(config.num_hidden_layers)]
    prefixes += [f"cls_pt_layers.{i}." for i in range(config.aggregation_layers)]
    return shared | {f"{prefix}attn.relative_position_index": index for prefix in prefixes if config.has_layer_bias}


def original_notes(config: BeitConfig) -> list[str]:
    """Returns what the original code does not take from an exported file, for the user."""
    notes = ["the original code reads tensors only; configuration, labels and images lie in the file for beit-jax"]
    if config.layer_norm_eps != 1e-6:
        notes.append(f"the original code's layer norm epsilon is 1e-06, this model's {config.layer_norm_eps:g}")
    if config.hidden_act != "gelu":
        notes.append(f"the original code's activation is gelu, this model's {config.hidden_act}")
    return notes


def _refusal(config: BeitConfig) -> str | None:
    if config.use_key_bias or config.use_sub_norm or config.embedding_size:
        return "the original BEiT has no bias of the keys, no norms within its branches and no embedding"
    if config.task == "masked_image_modeling" and config.pooling == "cls":
        return "the original has one norm before its pre-training head, and this model two"
    return None


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``checkpoint.pth``, ``{"model": state dict}``, for unilm's scripts."""
    tensors = naming.to_torch(checkpoint.config, checkpoint.params) | position_indices(checkpoint.config)
    write_pth(directory / "checkpoint.pth", "model", tensors, checkpoint)
    return original_notes(checkpoint.config)


UNILM = SourceFormat(
    name="original (unilm, data2vec_vision) and timm",
    backbone=BACKBONE,
    heads=HEADS,
    marker="blocks.0.attn.qkv.weight",
    prefixes=("",),
    hosts=("pretrained.model.", "backbone."),
    bilinear_hosts=("pretrained.model.",),  # isl-org/MiDaS@4545977 midas/backbones/beit.py, `_get_rel_pos_bias`
    copies=("alignment_encoder.",),  # CAE's target (Atten4Vis/CAE models/modeling_cae.py)
    # BEiT v2's second prediction, where it is left out (beit2/modeling_pretrain.py); the feature
    # pyramid that detection and segmentation add to the encoder (unilm dit/object_detection/ditod/beit.py).
    foreign=re.compile(r"^(cls_pt_(layers|norm|lm_head)|fpn[1-4])\."),
    describe=_describe,
    write=_write,
    refusal=_refusal,
)

FORMATS = (UNILM,)
