"""Short runs of every objective, by one process or by one of several.

Run as a script: ``objectives.py ROOT OUT OBJECTIVE,... [COORDINATOR PROCESSES PROCESS]``. ROOT, which `prepare` fills,
holds what the runs read; each leaves its directory in OUT.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit_jax.config import BeitConfig
from beit_jax.images import ImageProcessor
from beit_jax.models.build import param_shapes
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, save_tokenizer
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.train.data.prepare import prepare_ade20k, prepare_digits
from beit_jax.train.distributed.cluster import joined
from beit_jax.train.initial import model_config as resolve
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.recipe import HostOptions, Recipe
from beit_jax.train.recipes import recipe_named
from beit_jax.weights import NativeCheckpoint, save

STEPS, BATCH, EPOCH, SCENES = 3, 32, 1347 // 32, 18
COMMON = {"data.workers": 0, "data.batch-size": BATCH, "data.eval-batch-size": 96, "run.log-every": 1,
          "run.save-every": 100, "optim.epochs": STEPS / EPOCH, "optim.warmup-epochs": 1 / EPOCH}  # fmt: skip
SMALL = COMMON | {"model.image-size": 16}
MASK = {"mask.patches": 7, "mask.min-block": 2}
ENCODER = DvaeEncoderConfig(n_hid=8, vocab_size=16, group_count=2, n_blk_per_group=1, image_size=(8, 8))
TEACHER = BeitConfig(
    task="features", pooling="cls", image_size=(16, 16), patch_size=(4, 4), hidden_size=24, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=32, position_bias="shared",
)  # fmt: skip
SEGMENTER = BeitConfig(
    task="semantic_segmentation", image_size=(32, 32), patch_size=(8, 8), hidden_size=16, num_hidden_layers=4,
    num_attention_heads=2, intermediate_size=32, position_bias="per_layer", position_resize="geometric", labels=("a",),
    out_indices=(0, 1, 2, 3), auxiliary_channels=8,
)  # fmt: skip
# Everything whose randomness or pairing depends on the place of an image in the batch is on.
RUNS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, str]]] = {
    "classification": (
        "digits_finetune",
        SMALL | {
            "model.dropout": 0.1, "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.erasing": 0.5,
            "optim.accumulate": 2, "optim.ema": 0.9,
        },
        {},
    ),
    "linear_probe": ("digits_probe", SMALL | {"optim.warmup-epochs": 0.0}, {"init": "encoder"}),
    "masked_tokens": (
        "digits_pretrain",
        SMALL | MASK | {"model.drop-path": 0.1, "tokens.aggregate-from": 2, "tokens.aggregation-layers": 1},
        {"tokenizer": "tokenizer"},
    ),
    "data2vec": ("digits_data2vec", SMALL | MASK | {"model.dropout": 0.1}, {}),
    "vqkd": (
        "vqkd_base",
        SMALL | {
            "model.variant": "digits", "model.dtype": "float32", "vqkd.vocab-size": 32, "vqkd.codebook-dim": 8,
            "vqkd.decoder-layers": 1,
        },
        {"teacher": "teacher"},
    ),
    "dvae": (
        "digits_tokenizer",
        SMALL | {"dvae.vocab-size": 16, "dvae.width": 8, "dvae.groups": 2, "dvae.embedding": 8},
        {},
    ),
    "segmentation": (
        "beit_base_ade20k",
        {
            "model.image-size": 32, "model.drop-path": 0.1, "model.dtype": "float32", "data.batch-size": 16,
            "data.workers": 0, "segment.scale": (256, 64), "segment.photometric": False, "optim.lr": 3e-2,
            # A shift before batch normalization has no gradient but rounding, which Adam divides by its own size: the
            # training loss does not see such a shift, the validation loss (running means) does.
            "optim.epsilon": 1e-4,
            "optim.epochs": STEPS, "optim.warmup-epochs": 1, "run.log-every": 1, "run.save-every": 100,
            "run.eval-every-epochs": 1000,
        },
        {},
    ),
}  # fmt: skip
"""By objective: a recipe, what is changed of it, and what it reads."""


def recipe_with(name: str, options: Mapping[str, Any]) -> Recipe:
    """A recipe with these options, as they would stand on the command line."""
    recipe = recipe_named(name)
    for spelled, value in options.items():
        group, option = spelled.replace("-", "_").split(".")
        recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{option: value})})
    recipe.check()
    return recipe


def prepare(root: Path) -> None:
    """Writes data and checkpoints."""
    prepare_digits(root / "digits")
    for part in ("training", "validation"):
        for i in range(SCENES):
            write_scene(root / "ADEChallengeData2016", part, i)
    prepare_ade20k(root / "ADEChallengeData2016", root / "scenes")
    rng = np.random.default_rng(0)
    shapes = tokenizer_shapes(ENCODER)
    params = {name: (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))) for name, shape in shapes.items()}
    (root / "tokenizer").mkdir()
    tokenizer = TokenizerCheckpoint(ENCODER, {path: value.astype(np.float32) for path, value in params.items()})
    save_tokenizer(root / "tokenizer", tokenizer)
    encoder = replace(resolve._variant("digits"), task="features", image_size=(16, 16))
    for name, config in (("teacher", TEACHER), ("encoder", encoder)):
        (root / name).mkdir()
        processor = ImageProcessor(resize=config.image_size, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
        drawn = {
            path: (0.3 * rng.standard_normal(shape) + path.endswith("scale")).astype(np.float32)
            for path, shape in param_shapes(config).items()
        }
        save(root / name, NativeCheckpoint(config, processor, drawn, {"source": "a test"}))


def write_scene(root: Path, part: str, i: int) -> None:
    """Squares of three colours, one for each class; sizes differ."""
    rng = np.random.default_rng([i, part == "training"])
    height, width = (int(side) * 8 for side in rng.integers(5, 8, 2))
    classes = np.kron(rng.integers(0, 3, (height // 8, width // 8)), np.ones((8, 8), int))
    pixels = (np.eye(3)[classes] * 180 + rng.integers(0, 40, (height, width, 3))).astype(np.uint8)
    for kind, array in (("images", pixels), ("annotations", (classes + 1).astype(np.uint8))):
        path = root / kind / part / f"ADE_{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def run_all(objectives: Sequence[str], root: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    variant = resolve._variant
    for objective in objectives:
        name, changes, reads = RUNS[objective]
        segments = objective == "segmentation"
        resolve._variant = (lambda name: SEGMENTER) if segments else variant
        recipe = recipe_with(name, changes)
        assert recipe.objective == objective
        sources = {option: root / place for option, place in reads.items()}
        plan = make_plan(recipe, root / ("scenes" if segments else "digits"), **sources)
        train(plan, out / objective, quiet=True)


if __name__ == "__main__":
    root, out = map(Path, sys.argv[1:3])
    hosts = HostOptions(alone=True)
    if len(sys.argv) > 4:
        hosts = HostOptions(sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    with joined(hosts):
        run_all(sys.argv[3].split(","), root, out)
