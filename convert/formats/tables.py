"""Which torch tensor is which Flax leaf: one table per naming scheme, read in both directions.

To add a format, write its backbone and head rules below and add a `Naming` to `NAMINGS`; detection, checking, import,
export and parity follow from it. ``{i}`` stands for the layer of a stacked leaf. Backbone names are written bare; a
prefix (``beit.`` in a model with a head) is found in the file.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable

from .rules import CONV, CONV_TRANSPOSE, FLAT, FLAX_HEADS, FLAX_QKV, FUSED_QKV, KEEP, LINEAR, QKV, Op, Rule

_TABLE = "relative_position_bias.relative_position_bias_table"


def _rule(torch: str | tuple[str, ...], flax: str, op: Op | None = None) -> Rule:
    names = (torch,) if isinstance(torch, str) else torch
    return Rule(names, flax) if op is None else Rule(names, flax, op)


def _affine(torch: str, flax: str) -> tuple[Rule, Rule]:
    return _rule(f"{torch}.weight", f"{flax}/scale"), _rule(f"{torch}.bias", f"{flax}/bias")


def _linear(torch: str, flax: str) -> tuple[Rule, Rule]:
    return _rule(f"{torch}.weight", f"{flax}/kernel", LINEAR), _rule(f"{torch}.bias", f"{flax}/bias")


# transformers, names in files: those of transformers 4, which transformers 5 still writes.
_HF_LAYER = "encoder.layer.{i}."
_HF_ATTENTION = _HF_LAYER + "attention.attention."
_HF_BACKBONE: tuple[Rule, ...] = (
    _rule("embeddings.cls_token", "embeddings/cls_token"),
    _rule("embeddings.mask_token", "embeddings/mask_token"),
    _rule("embeddings.position_embeddings", "embeddings/position_embeddings"),
    _rule("embeddings.patch_embeddings.projection.weight", "embeddings/patch_kernel", CONV),
    _rule("embeddings.patch_embeddings.projection.bias", "embeddings/patch_bias"),
    _rule(f"encoder.{_TABLE}", "shared_bias_table"),
    *_affine(_HF_LAYER + "layernorm_before", "blocks/norm1"),
    _rule(
        (_HF_ATTENTION + "query.weight", _HF_ATTENTION + "key.weight", _HF_ATTENTION + "value.weight"),
        "blocks/attention/qkv_kernel",
        QKV,
    ),
    _rule(_HF_ATTENTION + "query.bias", "blocks/attention/q_bias", FLAT),
    _rule(_HF_ATTENTION + "value.bias", "blocks/attention/v_bias", FLAT),
    _rule(_HF_ATTENTION + _TABLE, "blocks/attention/bias_table"),
    _rule(_HF_LAYER + "attention.output.dense.weight", "blocks/attention/out_kernel", LINEAR),
    _rule(_HF_LAYER + "attention.output.dense.bias", "blocks/attention/out_bias"),
    _rule(_HF_LAYER + "lambda_1", "blocks/gamma_1"),
    *_affine(_HF_LAYER + "layernorm_after", "blocks/norm2"),
    *_linear(_HF_LAYER + "intermediate.dense", "blocks/mlp/fc1"),
    *_linear(_HF_LAYER + "output.dense", "blocks/mlp/fc2"),
    _rule(_HF_LAYER + "lambda_2", "blocks/gamma_2"),
    *_affine("layernorm", "norm"),
    *_affine("pooler.layernorm", "pooler_norm"),
)
_HF_HEADS: tuple[Rule, ...] = (
    *_affine("layernorm", "norm"),
    *_linear("lm_head", "lm_head"),
    *_linear("classifier", "classifier"),
)

# transformers 5, names in memory (``model.state_dict()``) of BEiT; Data2VecVision kept the old ones.
# Source: transformers 5.23 conversion_mapping.py, "BeitModel" and "ViTModel".
_HF5_RENAMES = (
    (_HF_ATTENTION + _TABLE, f"layers.{{i}}.{_TABLE}"),
    (f"encoder.{_TABLE}", "shared_position_bias.relative_position_bias_table"),
    (_HF_ATTENTION + "query.", "layers.{i}.attention.q_proj."),
    (_HF_ATTENTION + "key.", "layers.{i}.attention.k_proj."),
    (_HF_ATTENTION + "value.", "layers.{i}.attention.v_proj."),
    (_HF_LAYER + "attention.output.dense.", "layers.{i}.attention.o_proj."),
    (_HF_LAYER + "intermediate.dense.", "layers.{i}.mlp.fc1."),
    (_HF_LAYER + "output.dense.", "layers.{i}.mlp.fc2."),
    (_HF_LAYER, "layers.{i}."),
)


@dataclass(frozen=True)
class HeadNames:
    """How a source names the segmentation heads; the defaults are mmseg's words, which transformers 4 kept.

    Attributes:
        pyramid: of the first, second and third layer with weights of fpn1, and the one of fpn2.
        conv, norm: the two halves of a convolution with batch norm.
        bottleneck: of the pyramid pooling.
        pool: of the convolution of the k-th pooling scale.
        classifier: of both heads.
    """

    pyramid: tuple[str, str, str, str] = ("fpn1.0", "fpn1.1", "fpn1.3", "fpn2.0")
    conv: str = "conv"
    norm: str = "bn"
    bottleneck: str = "bottleneck"
    pool: str = "psp_modules.{k}.1"
    classifier: str = "classifier"

    def pyramid_rules(self) -> tuple[Rule, ...]:
        """Of the neck, which scales feature maps."""
        up4_first, up4_norm, up4_second, up2 = self.pyramid
        layers = ((up4_first, "up4_first"), (up4_second, "up4_second"), (up2, "up2"))
        return (
            *(
                rule
                for torch, flax in layers
                for rule in (
                    _rule(f"{torch}.weight", f"fpn/{flax}/kernel", CONV_TRANSPOSE),
                    _rule(f"{torch}.bias", f"fpn/{flax}/bias"),
                )
            ),
            *_batch_norm(up4_norm, "fpn/up4_norm"),
        )

    def head_rules(self, config: BeitConfig) -> tuple[Rule, ...]:
        """Of both heads, as many as the configuration says of what repeats."""
        decode = [(f"lateral_convs.{i}", f"lateral_{i}") for i in range(3)]
        decode += [(f"fpn_convs.{i}", f"smooth_{i}") for i in range(3)]
        decode += [(self.pool.replace("{k}", str(k)), f"pool_{k}") for k in range(len(config.pool_scales))]
        decode += [(self.bottleneck, "bottleneck"), ("fpn_bottleneck", "fuse")]
        auxiliary = [(f"convs.{i}", f"conv_{i}") for i in range(config.auxiliary_num_convs)]
        auxiliary.append(("conv_cat", "concat"))
        rules: list[Rule] = []
        for head, layers in (("decode_head", decode), ("auxiliary_head", auxiliary)):
            for torch, flax in layers:
                rules.append(_rule(f"{head}.{torch}.{self.conv}.weight", f"{head}/{flax}/kernel", CONV))
                rules.extend(_batch_norm(f"{head}.{torch}.{self.norm}", f"{head}/{flax}/norm"))
            rules.append(_rule(f"{head}.{self.classifier}.weight", f"{head}/classifier/kernel", CONV))
            rules.append(_rule(f"{head}.{self.classifier}.bias", f"{head}/classifier/bias"))
        return tuple(rules)


def _batch_norm(torch: str, flax: str) -> tuple[Rule, ...]:
    return (
        *_affine(torch, flax),
        _rule(f"{torch}.running_mean", f"{flax}/mean"),
        _rule(f"{torch}.running_var", f"{flax}/var"),
    )


_V5_WORDS = HeadNames(
    conv="convolution", norm="normalization", bottleneck="psp_bottleneck", pool="psp_modules.blocks.{k}.conv"
)
_V5_PYRAMID = (
    "fpn.fpn1.conv_transpose1", "fpn.fpn1.normalization", "fpn.fpn1.conv_transpose2", "fpn.fpn2",
)  # fmt: skip


def _renamed(rules: Sequence[Rule], renames: Sequence[tuple[str, str]]) -> tuple[Rule, ...]:
    """The rules with every torch name rewritten by the first (old, new) whose old text begins it."""

    def rename(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)

    return tuple(replace(rule, torch=tuple(map(rename, rule.torch))) for rule in rules)


# The original code (unilm's BEiT, BEiT v2 and DiT, data2vec_vision), and timm, which kept its names.
_UNILM_BACKBONE: tuple[Rule, ...] = (
    _rule("cls_token", "embeddings/cls_token"),
    _rule("mask_token", "embeddings/mask_token"),
    _rule("pos_embed", "embeddings/position_embeddings"),
    _rule("patch_embed.proj.weight", "embeddings/patch_kernel", CONV),
    _rule("patch_embed.proj.bias", "embeddings/patch_bias"),
    _rule("rel_pos_bias.relative_position_bias_table", "shared_bias_table"),
    *_affine("blocks.{i}.norm1", "blocks/norm1"),
    _rule("blocks.{i}.attn.qkv.weight", "blocks/attention/qkv_kernel", FUSED_QKV),
    _rule("blocks.{i}.attn.q_bias", "blocks/attention/q_bias", FLAT),
    _rule("blocks.{i}.attn.v_bias", "blocks/attention/v_bias", FLAT),
    _rule("blocks.{i}.attn.relative_position_bias_table", "blocks/attention/bias_table"),
    _rule("blocks.{i}.attn.proj.weight", "blocks/attention/out_kernel", LINEAR),
    _rule("blocks.{i}.attn.proj.bias", "blocks/attention/out_bias"),
    _rule("blocks.{i}.gamma_1", "blocks/gamma_1"),
    *_affine("blocks.{i}.norm2", "blocks/norm2"),
    *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
    *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
    _rule("blocks.{i}.gamma_2", "blocks/gamma_2"),
    *_affine("norm", "norm"),
    *_affine("fc_norm", "pooler_norm"),
)
_UNILM_HEADS: tuple[Rule, ...] = (
    *_affine("norm", "norm"),
    *_linear("lm_head", "lm_head"),
    *_linear("head", "classifier"),
)

# transformers 4's FlaxBeit, ``flax_model.msgpack``: the torch names with Flax's leaf names and layouts.
_FLAX_OPS = {QKV: FLAX_QKV, LINEAR: KEEP, CONV: KEEP}


def _flax_names(rule: Rule) -> Rule:
    leaf = rule.flax.rpartition("/")[2].rpartition("_")[2]  # kernel, scale, bias, or a tensor with a name of its own
    known = leaf if leaf in ("kernel", "scale", "bias") else None
    names = tuple(name.replace(".weight", f".{known}") if known else name for name in rule.torch)
    op = FLAX_HEADS if rule.flax.endswith("out_kernel") else _FLAX_OPS.get(rule.op, rule.op)
    return Rule(tuple(name.replace(".", "/") for name in names), rule.flax, op)


@dataclass(frozen=True)
class Naming:
    """How one source names its tensors.

    Attributes:
        marker: a tensor that every file of this naming has and no naming after it has, without prefix.
        head_marker: another one, of a head, for a naming that differs in the heads only.
        prefixes: what may stand before backbone names.
        segmentation: the names of the segmentation heads.
        hosts: prefixes under which other models (DPT, MiDaS) keep a BEiT encoder; the rest of such a file is theirs.
        derived: matches tensors that are computed, not learned, and are therefore left out.
        foreign: matches learned tensors of heads that exist nowhere here; left out and told.
    """

    name: str
    backbone: tuple[Rule, ...]
    heads: tuple[Rule, ...]
    marker: str
    prefixes: tuple[str, ...]
    segmentation: HeadNames = HeadNames()
    head_marker: str | None = None
    hosts: tuple[str, ...] = ()
    derived: re.Pattern[str] = re.compile(r"(^|[./])(relative_position_index|num_batches_tracked)$")
    foreign: re.Pattern[str] = re.compile(r"(?!)")

    def rules(self, config: BeitConfig, prefix: str) -> list[Rule]:
        """The rules for a model: torch names with `prefix`, Flax paths as `beit_jax.models.build.MODELS` lays them out."""
        parent = "" if config.task == "features" else "beit/"
        backbone = [
            replace(rule, torch=tuple(prefix + name for name in rule.torch), flax=parent + rule.flax)
            for rule in self.backbone
        ]
        if config.task == "features":
            return backbone
        if config.task == "backbone":
            return [*map(_prefixed_norm, backbone), *self.segmentation.pyramid_rules()]
        if config.task == "semantic_segmentation":
            return [*backbone, *self.segmentation.pyramid_rules(), *self.segmentation.head_rules(config)]
        return [*backbone, *self.heads]

    def own_prefix(self, config: BeitConfig) -> str:
        """The prefix this source itself would write for the model."""
        if len(self.prefixes) == 1:
            return self.prefixes[0]
        if config.task in ("features", "backbone"):
            return ""
        family = config.model_type.replace("-", "_")
        found = [prefix for prefix in self.prefixes if prefix.startswith(family)]
        if not found:
            raise BeitJaxError(f"{self.name} has no {config.model_type} models")
        return found[0]


def _prefixed_norm(rule: Rule) -> Rule:
    """transformers 5 writes a backbone without prefix, except for the norm of its (unused) last state."""
    if not rule.flax.startswith("beit/norm/"):
        return rule
    return replace(rule, torch=tuple("beit." + name.removeprefix("beit.") for name in rule.torch))


HF = Naming(
    name="transformers",
    backbone=_HF_BACKBONE,
    heads=_HF_HEADS,
    marker="encoder.layer.0.attention.attention.query.weight",
    prefixes=("beit.", "data2vec_vision.", ""),
    hosts=("backbone.",),
)
# Data2VecVision's heads follow BEiT's since transformers 5, but nothing renames them on the way to a file.
HF5_DATA2VEC = replace(
    HF,
    name="transformers 5 (Data2VecVision segmentation)",
    hosts=(),
    segmentation=_V5_WORDS,
    head_marker="decode_head.psp_bottleneck.convolution.weight",
)
HF5 = replace(
    HF,
    name="transformers 5 in memory",
    backbone=_renamed(_HF_BACKBONE, _HF5_RENAMES),
    marker="layers.0.attention.q_proj.weight",
    segmentation=replace(_V5_WORDS, pyramid=_V5_PYRAMID),
    hosts=("backbone.beit.", "backbone."),
)
UNILM = Naming(
    name="original (unilm, data2vec_vision) and timm",
    backbone=_UNILM_BACKBONE,
    heads=_UNILM_HEADS,
    marker="blocks.0.attn.qkv.weight",
    prefixes=("",),
    hosts=("pretrained.model.", "backbone.", "encoder."),
    # BEiT v2's second prediction from an intermediate layer (beit2/modeling_pretrain.py).
    foreign=re.compile(r"^cls_pt_(layers|norm|lm_head)\."),
)
FLAX = Naming(
    name="transformers 4 FlaxBeit",
    backbone=tuple(map(_flax_names, _HF_BACKBONE)),
    heads=tuple(map(_flax_names, _HF_HEADS)),
    marker="encoder/layer/0/attention/attention/query/kernel",
    prefixes=("beit/", ""),
)
MMSEG = Naming(
    name="mmseg",
    backbone=_UNILM_BACKBONE,
    heads=(),
    marker="blocks.0.attn.qkv.weight",
    prefixes=("backbone.",),
    segmentation=HeadNames(
        pyramid=("backbone.fpn1.0", "backbone.fpn1.1", "backbone.fpn1.3", "backbone.fpn2.0"), classifier="conv_seg"
    ),
    head_marker="decode_head.conv_seg.weight",
)

NAMINGS = (HF5_DATA2VEC, HF, HF5, MMSEG, UNILM, FLAX)


def own_naming(config: BeitConfig) -> Naming:
    """The naming under which transformers itself writes the model to a file."""
    is_data2vec = config.model_type == "data2vec-vision" and config.task == "semantic_segmentation"
    return HF5_DATA2VEC if is_data2vec else HF


def recognise(names: Collection[str], file: str) -> tuple[Naming, str]:
    """The naming of a file's tensors and the prefix of its backbone.

    Raises:
        BeitJaxError: no naming fits, showing a few of the names.
    """
    for naming in NAMINGS:
        for prefix in (*naming.prefixes, *naming.hosts):
            if prefix + naming.marker in names and (naming.head_marker is None or naming.head_marker in names):
                return naming, prefix
    shown = ", ".join(printable(name, 60) for name in sorted(names)[:3])
    known = ", ".join(naming.name for naming in NAMINGS)
    raise BeitJaxError(f"{file}: no BEiT names (known: {known}) among those of its {len(names)} tensors: {shown}, ...")
