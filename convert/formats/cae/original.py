"""CAE (arXiv 2202.03026) as its authors save it: pre-training, its versions 1 and 2, classifiers, and attentive probes.

The encoder is BEiT's, with positions that are not learned. Parts that predict the hidden patches in pre-training, and
those that pool a probe, have no place here. Source: Atten4Vis/CAE@a7fd162 models/modeling_cae.py,
modeling_cae_helper.py and modeling_finetune.py, tools/run_class_finetuning.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from beit_jax.config import BeitConfig
from beit_jax.images.processor import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, preset

from .. import unilm
from ..format import Description, Place, Sighting, SourceFormat, describe_by_config
from ..heads import BASE, LARGE, Size, Statement, all_settings, stated_in_training

if TYPE_CHECKING:
    from ...files.weight_file import TensorInfo

_HEADS: Mapping[Size, int] = {Size(192, 12, 768): 12, Size(384, 12, 1536): 12, BASE: 12, LARGE: 16}
"""Attention heads of CAE's models, tiny to large. The two small ones have more than other models of their widths."""

_PROBED = "an encoder: its classifier pools by attention, which is not computed here"


def _describe(sighting: Sighting) -> Description:
    if sighting.content is not None:
        return describe_by_config(sighting)

    def heads(size: Size) -> list[Statement]:
        stated = sighting.num_heads is not None or bool(stated_in_training(sighting.metadata, size))
        known = _HEADS.get(size)
        return [] if stated or known is None else [Statement(known, f"as CAE's models of width {size.width}")]

    found = unilm.describe_by_tensors(replace(sighting, format=unilm.UNILM), heads=heads)
    seen = (f"{sighting.format.name}: names and shapes of the tensors", *found.seen[1:])
    return replace(found, seen=seen, assumed=partial(_images, found.config) if _by_imagenet(sighting) else None)


def _describe_probe(sighting: Sighting) -> Description:
    found = _describe(replace(sighting, hosted=sighting.content is None))
    return replace(found, seen=(*found.seen, _PROBED))


def _by_imagenet(sighting: Sighting) -> bool:
    """True if images have ImageNet's mean and deviation: the training says it, or names say CAE and it says nothing."""
    key = "imagenet_default_mean_and_std"
    stated = [settings[key] for _, settings in all_settings(sighting.metadata) if key in settings]
    return any(each is True for each in stated) if stated else sighting.format is not CLASSIFIER


def _images(config: BeitConfig) -> ImageProcessor:
    size, channels = config.image_size, config.num_channels
    return preset("unilm_eval", size, mean=IMAGENET_MEAN, std=IMAGENET_STD, num_channels=channels)


def _has_both_positions(tensors: Mapping[str, "TensorInfo"], place: Place, _: object) -> bool:
    """True for fixed positions beside a table of each block, which CAE's classifiers have and no published BEiT."""
    names = "pos_embed", "blocks.0.attn.relative_position_bias_table"
    return all(place.before + name in tensors for name in names)


PRETRAINED = replace(
    unilm.UNILM,
    name="CAE pre-training",
    prefixes=("encoder.",),
    head_marker="regresser.norm.weight",
    hosts=(),
    copies=(),
    # The regressor predicts what the alignment encoder sees, the decoder its visual tokens; version 2 has no alignment.
    foreign=re.compile(
        r"^(alignment_encoder|regresser|decoder|encoder_to_regresser(_norm)?|rd_pos_embed|mask_token)(\.|$)"
    ),
    describe=_describe,
    write=None,
)
CLASSIFIER = replace(
    unilm.UNILM,
    name="CAE, fine-tuned",
    hosts=(),
    fits=_has_both_positions,
    matches=lambda content: content is None,
    describe=_describe,
    write=None,
)
PROBE = replace(
    unilm.UNILM,
    name="CAE, attentive probe",
    head_marker="attentive_blocks.0.cross_attn.q.weight",
    foreign=re.compile(r"^(query_token|attentive_blocks|fc_norm|head)(\.|$)"),
    describe=_describe_probe,
    write=None,
)

FORMATS: tuple[SourceFormat, ...] = (PRETRAINED, PROBE, CLASSIFIER)
