"""BEiT and Data2Vec-Vision in JAX/Flax.

>>> import beit_jax
>>> model, processor = beit_jax.from_pretrained("facebook/data2vec-vision-base-ft1k")
>>> logits = model(processor("cat.jpg")).logits

Models     BeitModel, BeitForMaskedImageModeling, BeitForImageClassification, BeitForSemanticSegmentation, BeitBackbone,
           BeitOutput
Describing BeitConfig, VARIANTS
Loading    from_pretrained, save_pretrained, build_model, NativeCheckpoint, load, save
Images     ImageProcessor, preset, open_image
Using      classify, features, segment
Tables     write_features, write_classes, feature_rows, record_batches: of any number of images
Serving    load_program, Program: what `beit-jax export --to stablehlo` writes, without Flax
Looking    interpret: attention, rollout, position bias as arrays; visualize: pictures of them, by matplotlib
Errors     BeitJaxError
Speed      keep_freed_memory, pack

`beit_jax.convert` is the converter and the parity check, `beit_jax.train` trains. A name is imported when it is first
used, because importing JAX takes longer than ``beit-jax --help`` may. No other module imports this one's names.

The modules in this folder are the ground on which all rooms stand: errors, files, outputs, locks, configurations, names
of models. May import: only each other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from beit_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from beit_jax.bulk.face import feature_rows, record_batches, write_classes, write_features
    from beit_jax.config import BeitConfig
    from beit_jax.errors import BeitJaxError
    from beit_jax.images.processor import ImageProcessor, open_image, preset
    from beit_jax.inference.packing import pack
    from beit_jax.inference.predict import classify, features, from_pretrained
    from beit_jax.inference.reading import load_any as load
    from beit_jax.inference.saving import save_checkpoint as save
    from beit_jax.inference.saving import save_pretrained
    from beit_jax.inference.segmentation import segment
    from beit_jax.looking import interpret as interpret
    from beit_jax.looking import visualize as visualize
    from beit_jax.memory import keep_freed_memory
    from beit_jax.models.build import build_model
    from beit_jax.models.classifier import BeitForImageClassification
    from beit_jax.models.encoder import BeitModel
    from beit_jax.models.interface import BeitOutput
    from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
    from beit_jax.models.segmenter import BeitBackbone, BeitForSemanticSegmentation
    from beit_jax.programs.program import Program, load_program
    from beit_jax.variants import VARIANTS
    from beit_jax.weights.native import NativeCheckpoint

# Name to the module that defines it, and its name there if it is another one.
_HOME: dict[str, str | tuple[str, str]] = {
    "VARIANTS": "variants",
    "BeitConfig": "config",
    "BeitModel": "models.encoder",
    "BeitOutput": "models.interface",
    "BeitJaxError": "errors",
    "BeitBackbone": "models.segmenter",
    "BeitForImageClassification": "models.classifier",
    "BeitForMaskedImageModeling": "models.masked_image_modeling",
    "BeitForSemanticSegmentation": "models.segmenter",
    "build_model": "models.build",
    "keep_freed_memory": "memory",
    "ImageProcessor": "images.processor",
    "open_image": "images.processor",
    "preset": "images.processor",
    "classify": "inference.predict",
    "feature_rows": "bulk.face",
    "features": "inference.predict",
    "record_batches": "bulk.face",
    "write_classes": "bulk.face",
    "write_features": "bulk.face",
    "from_pretrained": "inference.predict",
    "NativeCheckpoint": "weights.native",
    "Program": "programs.program",
    "load": ("inference.reading", "load_any"),
    "load_program": "programs.program",
    "pack": "inference.packing",
    "save": ("inference.saving", "save_checkpoint"),
    "save_pretrained": "inference.saving",
    "segment": "inference.segmentation",
}

# Name to the module that it is.
_MODULES = {"interpret": "looking.interpret", "visualize": "looking.visualize"}

__all__ = [
    "VARIANTS",
    "BeitBackbone",
    "BeitConfig",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitJaxError",
    "BeitModel",
    "BeitOutput",
    "ImageProcessor",
    "NativeCheckpoint",
    "Program",
    "build_model",
    "classify",
    "feature_rows",
    "features",
    "from_pretrained",
    "keep_freed_memory",
    "load",
    "load_program",
    "open_image",
    "pack",
    "preset",
    "record_batches",
    "save",
    "save_pretrained",
    "segment",
    "write_classes",
    "write_features",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _HOME:
        home = _HOME[name]
        module, attribute = (home, name) if isinstance(home, str) else home
        value = getattr(import_module(f"{__name__}.{module}"), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
