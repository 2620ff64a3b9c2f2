"""transformers 4's FlaxBeit, ``flax_model.msgpack``: the names of its torch models, with Flax's leaves and layouts."""

from .format import SourceFormat
from .rules import CONV, FLAX_HEADS, FLAX_QKV, KEEP, LINEAR, QKV, Rule
from .transformers import BACKBONE, HEADS

_OPERATIONS = {QKV: FLAX_QKV, LINEAR: KEEP, CONV: KEEP}


def _flax_names(rule: Rule) -> Rule:
    leaf = rule.flax.rpartition("/")[2].rpartition("_")[2]  # kernel, scale, bias, or a tensor with a name of its own
    known = leaf if leaf in ("kernel", "scale", "bias") else None
    names = tuple(name.replace(".weight", f".{known}") if known else name for name in rule.torch)
    op = FLAX_HEADS if rule.flax.endswith("out_kernel") else _OPERATIONS.get(rule.op, rule.op)
    return Rule(tuple(name.replace(".", "/") for name in names), rule.flax, op)


FLAX = SourceFormat(
    name="transformers 4 FlaxBeit",
    backbone=tuple(map(_flax_names, BACKBONE)),
    heads=tuple(map(_flax_names, HEADS)),
    marker="encoder/layer/0/attention/attention/query/kernel",
    prefixes=("beit/", ""),
)

FORMATS = (FLAX,)
