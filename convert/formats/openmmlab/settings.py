"""The Python file of an export: the model as Open-MMLab's libraries build it, and how they prepare images.

mmengine runs such a file as Python (`mmengine.Config.fromfile`); it holds plain values alone.
Source: mmengine 0.10.7 config/config.py; mmpretrain 1.2.0 models/utils/data_preprocessor.py and
datasets/transforms/processing.py; mmsegmentation 1.2.2 models/data_preprocessor.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.images.processor import ImageProcessor, Within
from beit_jax.version import __version__

from ..writing import PTH, SETTINGS, write_pth
from .names import position_indices

if TYPE_CHECKING:
    from beit_jax.config import BeitConfig
    from beit_jax.weights.native import NativeCheckpoint

    from ..format import SourceFormat

_EIGHT_BITS = 1 / 255
# The tanh approximation has two names in transformers.
_ACTIVATIONS: Mapping[str, Mapping[str, Any]] = {
    "gelu": {"type": "GELU"},
    "gelu_new": {"type": "GELU", "approximate": "tanh"},
    "gelu_pytorch_tanh": {"type": "GELU", "approximate": "tanh"},
    "relu": {"type": "ReLU"},
    "silu": {"type": "SiLU"},
}


def activation(config: "BeitConfig") -> dict[str, Any]:
    """Returns the ``act_cfg`` of the model's activation."""
    return dict(_ACTIVATIONS[config.hidden_act])


def write(
    naming: "SourceFormat",
    directory: Path,
    checkpoint: "NativeCheckpoint",
    settings: Mapping[str, Any],
    use: str,
) -> None:
    """Writes ``checkpoint.pth``, ``{"meta", "state_dict"}`` as mmengine loads it, and ``config.py``.

    Args:
        settings: the variables of ``config.py``.
        use: how a user makes the model of the two files, for its first line.
    """
    config = checkpoint.config
    text = f"# Written by beit-jax {__version__}: {use}\n" + python(settings)
    tensors = naming.to_torch(config, checkpoint.params) | position_indices(config)
    meta: dict[str, Any] = {"cfg": text}
    if config.labels:
        meta["dataset_meta"] = {"classes": tuple(config.labels)}
    write_pth(directory / PTH, "state_dict", tensors, checkpoint, {"meta": meta})
    (directory / SETTINGS).write_text(text, encoding="utf-8")


def python(settings: Mapping[str, Any]) -> str:
    """Returns variables as the text of a Python file; keys within them are words."""
    return "".join(f"{name} = {_value(value, '')}\n" for name, value in settings.items())


def _value(value: Any, indent: str) -> str:
    deeper = indent + "    "
    if isinstance(value, Mapping):
        items = [f"{key}={_value(item, deeper)}" for key, item in value.items()]
        before, after = "dict(", ")"
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items, before, after = [_value(item, deeper) for item in value], "[", "]"
    else:
        return repr(value)
    line = f"{before}{', '.join(items)}{after}"
    if len(indent) + len(line) <= _WIDTH and "\n" not in line:
        return line
    return f"{before}\n" + "".join(f"{deeper}{item},\n" for item in items) + f"{indent}{after}"


_WIDTH = 100


def image_numbers(processor: ImageProcessor) -> dict[str, Any]:
    """Returns mean and standard deviation of values from 0 to 255, which their preprocessors divide by."""
    factor, count = processor.rescale_factor or 1.0, processor.num_channels
    mean, std = processor.mean or (0.0,) * count, processor.std or (1.0,) * count
    if factor == _EIGHT_BITS:  # 0.5 becomes 127.5
        return {"mean": [value * 255 for value in mean], "std": [value * 255 for value in std]}
    return {"mean": [value / factor for value in mean], "std": [value / factor for value in std]}


def load(processor: ImageProcessor) -> dict[str, Any]:
    """Returns the step that reads an image file; of one channel, in grey."""
    return {"type": "LoadImageFromFile"} | ({"color_type": "grayscale"} if processor.num_channels == 1 else {})


def resize(processor: ImageProcessor) -> list[dict[str, Any]]:
    """Returns the step that resizes, of mmcv, where proportions do not matter or two edges bound them."""
    size = processor.resize
    if size is None or isinstance(size, int):
        return []
    bounds = (size.long, size.short) if isinstance(size, Within) else (size[1], size[0])
    step = {"type": "Resize", "scale": bounds, "keep_ratio": isinstance(size, Within)}
    return [step | {"backend": "pillow" if processor.antialias else "cv2", "interpolation": processor.resample}]
