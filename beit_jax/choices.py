"""The closed lists of words in a configuration, and the nearest right word to a wrong one. Imports nothing here."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

ModelType = Literal["beit", "data2vec-vision"]
Task = Literal["features", "masked_image_modeling", "image_classification", "semantic_segmentation", "backbone"]
PositionBias = Literal["none", "shared", "per_layer", "both"]
Pooling = Literal["mean", "cls"]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
PositionResize = Literal["bilinear", "geometric", "geometric_linear"]
FeatureTaps = Literal["original", "hf"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PresetName = Literal["hf", "unilm_eval", "timm"]  # of images; see `beit_jax.images.processor.preset`

# What other libraries call a value, where it looks like none of ours.
_OTHER_NAMES: Mapping[str, str] = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_pytorch_tanh",
    "avg": "mean",
    "average": "mean",
    "token": "cls",
    "classification": "image_classification",
    "segmentation": "semantic_segmentation",
    "pretraining": "masked_image_modeling",
    "mim": "masked_image_modeling",
    "multi_label": "multi_label_classification",
    "single_label": "single_label_classification",
}


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Returns the word of a list that was probably meant; None if none looks like it."""
    plain = word[:100].strip().lower().replace(" ", "_")
    by_plain = {each.replace("-", "_"): each for each in known}
    candidate = _OTHER_NAMES.get(plain.replace("-", "_"))
    if candidate in known:
        return candidate
    near = difflib.get_close_matches(plain.replace("-", "_"), by_plain, n=1)
    return by_plain[near[0]] if near else None
