"""Imports only go down the floor plan, and the library never needs torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first. A module may import, at its top, only modules that stand before it. Imports inside functions are the
# deliberate exceptions: the command line and `hub` reach the converter when they need it, `kept` the models.
LIBRARY = [
    "errors", "allocator", "terminal", "arguments", "tree", "json_file", "config", "variants", "published", "resize",
    "image_config", "image_io", "images", "label_maps", "position", "adapt", "partition", "activations", "attention",
    "layers", "dense", "encoder", "segmenter", "heads", "output", "weights", "dvae", "vqkd", "tokenizer", "hub",
    "predictor", "predict", "kept", "segmentation", "pictures", "interpret", "visualize", "inspection", "reconstruct",
    "demo",
]  # fmt: skip
CONVERT = [
    "options", "weight_file", "safetensors_file", "msgpack_file", "pickle_names", "pickle_machine",
    "pickle_container", "pickle_module", "pickle_state", "pickle_file", "shard_index", "checkpoint", "rules",
    "tables", "fit", "mmseg", "identify", "importer", "exporter", "tokenizers", "parity",
]  # fmt: skip
TRAIN = [
    "recipe", "pretraining_recipes", "recipes", "resolve", "schedule", "kernels", "resample", "smooth", "randaugment",
    "decode", "augment", "masking", "views", "segmentation_augment", "mixing", "builders", "prepare", "data", "state",
    "optim", "initialize",
    "segmentation", "objectives", "codebook", "teachers", "vqkd", "dvae", "pretraining", "topology", "sharding", "step",
    "hosts", "peers", "cluster", "lock", "digests", "step_files", "snapshot", "checkpoint", "log", "watch", "estimate",
    "evaluate", "accuracy", "labelled", "confusion", "probe", "stored_tokens", "task", "supervised", "unsupervised",
    "program", "plan", "preview", "hlo", "aot", "scaling", "contract", "loop", "commands",
]  # fmt: skip
COMMANDS = ["plot_commands", "__main__"]
ORDER = [
    *(f"beit_jax.{name}" for name in LIBRARY),
    *(f"beit_jax.convert.{name}" for name in CONVERT),
    *(f"beit_jax.train.{name}" for name in TRAIN),
    *(f"beit_jax.{name}" for name in COMMANDS),
]
FILES = {
    f"beit_jax.{name}": ROOT / "beit_jax" / f"{name}.py" for name in [*LIBRARY, *COMMANDS]
} | {f"beit_jax.convert.{name}": ROOT / "convert" / f"{name}.py" for name in CONVERT} | {
    f"beit_jax.train.{name}": ROOT / "train" / f"{name}.py" for name in TRAIN
}  # fmt: skip


def imports(module: str) -> set[str]:
    """Modules of this project that a module imports when it is imported."""
    package = module.rpartition(".")[0]
    found = set()
    for node in ast.parse(FILES[module].read_text()).body:  # top level only: not inside functions or TYPE_CHECKING
        if isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module}" if node.level else node.module or ""
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place() -> None:
    files = {path for room in ("beit_jax", "convert", "train") for path in (ROOT / room).glob("*.py")}
    assert files - set(FILES.values()) == {ROOT / room / "__init__.py" for room in ("beit_jax", "convert", "train")}


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module: str) -> None:
    above = set(ORDER[ORDER.index(module) :]) | {"train", "convert"}
    if module.startswith("beit_jax.train."):  # training reads native checkpoints only
        above |= {"beit_jax.convert", *(f"beit_jax.convert.{name}" for name in CONVERT)}
    else:
        above |= {"beit_jax.train"}
    assert not imports(module) & above


@pytest.mark.parametrize("module", ORDER)
def test_torch_is_not_imported(module: str) -> None:
    assert not any(name.partition(".")[0] in ("torch", "transformers", "timm") for name in imports(module))
