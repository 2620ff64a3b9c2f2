"""The contenders of a forward pass by name, and what they need to be installed."""

from collections.abc import Mapping
from importlib.util import find_spec

KINDS = ("forward", "segment")
_TORCH, _TIMM = ("torch", "transformers"), ("torch", "timm")
_ONNX = (*_TORCH, "onnx", "onnxscript")  # by which torch exports
NEEDS: Mapping[str, tuple[str, ...]] = {
    "ours": (),
    "transformers, sdpa": _TORCH,
    "transformers, eager": _TORCH,
    "transformers, sdpa, compiled": _TORCH,
    "timm": _TIMM,
    "timm, compiled": _TIMM,
    "ours, XLA": (),
    "onnxruntime": ("onnxruntime", *_ONNX),
    "openvino": ("openvino", *_ONNX),
}
"""Every contender, and the packages that it needs."""


def missing(contender: str) -> list[str]:
    """The packages that a contender needs and that are not installed."""
    return [package for package in NEEDS[contender] if find_spec(package) is None]
