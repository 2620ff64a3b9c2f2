"""The published runs, one function each: docstring = source, hardware and expected result; body = the numbers.

`beit-jax train NAME --data DIR --out DIR` carries one out; every number can be changed on the command line. Batch sizes
are global (GPUs x images x accumulation of the original). Numbers: microsoft/unilm@768a3c8 beit/README.md and
beit/get_started_for_image_classification.md, beit2/README.md and beit2/get_started_for_image_classification.md, and
the configs of both semantic_segmentation folders;
facebookresearch/data2vec_vision@af9a363 beit/README.md. Everything the commands there do not say is the default of
their run_class_finetuning.py, which the dataclasses of `recipe` hold.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from beit_jax.errors import BeitJaxError, printable

from ..recipe import AugmentOptions, DataOptions, ModelOptions, OptimOptions, Recipe, RunOptions, SegmentationOptions
from .pretraining import PRETRAINING

_MIXED = AugmentOptions(mixup=0.8, cutmix=1.0)
_BASE, _LARGE = "beit_base_patch16_224", "beit_large_patch16_224"


def _finetune(
    variant: str,
    *,
    batch_size: int,
    lr: float,
    warmup: float,
    epochs: float,
    layer_decay: float,
    drop_path: float,
    mixed: bool,
    weight_decay: float = 0.05,
    image_size: int | None = None,
) -> Recipe:
    """A line of the fine-tuning tables."""
    return Recipe(
        name="",
        model=ModelOptions(variant=variant, drop_path=drop_path, image_size=image_size),
        data=DataOptions(batch_size=batch_size),
        augment=_MIXED if mixed else AugmentOptions(),
        optim=OptimOptions(
            lr=lr, warmup_epochs=warmup, epochs=epochs, layer_decay=layer_decay, weight_decay=weight_decay
        ),
    )


def _imagenet_statistics(recipe: Recipe) -> Recipe:
    return replace(recipe, data=replace(recipe.data, statistics="imagenet"))


# --- BEiT: pre-trained on ImageNet-22k, then fine-tuned there ("intermediate"), then on ImageNet-1k.


def beit_base_ft22k() -> Recipe:
    """BEiT-B, pre-trained on ImageNet-22k (`beit_base_patch16_224_pt22k`), fine-tuned on its 21,841 classes.

    16 GPUs x 256. The command there names --clip_grad 3.0, which DeepSpeed never received; it is off here as it was.
    """
    return _finetune(
        "beit_base_patch16_224_pt22k_ft22k",
        batch_size=4096,
        lr=3e-3,
        warmup=5,
        epochs=90,
        layer_decay=0.65,
        drop_path=0.2,
        mixed=False,
    )


def beit_large_ft22k() -> Recipe:
    """BEiT-L, pre-trained on ImageNet-22k (`beit_large_patch16_224_pt22k`), fine-tuned on its 21,841 classes.

    16 GPUs x 64 x 2, label smoothing 1e-5.
    """
    recipe = _finetune(
        "beit_large_patch16_224_pt22k_ft22k",
        batch_size=2048,
        lr=2e-3,
        warmup=5,
        epochs=90,
        layer_decay=0.75,
        drop_path=0.2,
        mixed=False,
    )
    return replace(recipe, augment=replace(recipe.augment, smoothing=1e-5), optim=replace(recipe.optim, accumulate=2))


def beit_base_ft22k_ft1k() -> Recipe:
    """BEiT-B at 224 on ImageNet-1k, from `beit_base_patch16_224_pt22k_ft22k`: 85.2 top-1. 8 GPUs x 64."""
    return _finetune(
        _BASE,
        batch_size=512,
        lr=2e-5,
        warmup=5,
        epochs=30,
        layer_decay=0.85,
        drop_path=0.1,
        weight_decay=1e-8,
        mixed=False,
    )


def beit_base_ft22k_ft1k_384() -> Recipe:
    """BEiT-B at 384 on ImageNet-1k, from `beit_base_patch16_224_pt22k_ft22k`: 86.8 top-1."""
    return _sized(beit_base_ft22k_ft1k(), "beit_base_patch16_384")


def beit_large_ft22k_ft1k() -> Recipe:
    """BEiT-L at 224 on ImageNet-1k, from `beit_large_patch16_224_pt22k_ft22k`: 87.4 top-1. 8 GPUs x 32 x 2."""
    recipe = _finetune(
        _LARGE,
        batch_size=512,
        lr=2e-5,
        warmup=5,
        epochs=30,
        layer_decay=0.9,
        drop_path=0.4,
        weight_decay=1e-8,
        mixed=False,
    )
    return replace(recipe, optim=replace(recipe.optim, accumulate=2))


def beit_large_ft22k_ft1k_384() -> Recipe:
    """BEiT-L at 384 on ImageNet-1k, from `beit_large_patch16_224_pt22k_ft22k`: 88.4 top-1."""
    return _sized(beit_large_ft22k_ft1k(), "beit_large_patch16_384")


def beit_large_ft22k_ft1k_512() -> Recipe:
    """BEiT-L at 512 on ImageNet-1k, from `beit_large_patch16_224_pt22k_ft22k`: 88.60 top-1."""
    return _sized(beit_large_ft22k_ft1k(), "beit_large_patch16_512")


def beit_base_ft1k() -> Recipe:
    """BEiT-B at 224 on ImageNet-1k, from `beit_base_patch16_224_pt22k`: 83.7 top-1. 8 GPUs x 128."""
    return _finetune(
        _BASE, batch_size=1024, lr=4e-3, warmup=20, epochs=100, layer_decay=0.65, drop_path=0.1, mixed=True
    )


def beit_large_ft1k() -> Recipe:
    """BEiT-L at 224 on ImageNet-1k, from `beit_large_patch16_224_pt22k`: 86.0 top-1. 8 GPUs x 64 x 2."""
    recipe = _finetune(
        _LARGE, batch_size=1024, lr=1e-3, warmup=5, epochs=50, layer_decay=0.75, drop_path=0.2, mixed=True
    )
    return replace(recipe, optim=replace(recipe.optim, accumulate=2))


# --- BEiT v2: ImageNet's statistics; from pre-training of 300 or 1600 epochs, or by way of 21k classes.


def _v2(variant: str, *, lr: float, warmup: float, epochs: float, layer_decay: float, drop_path: float) -> Recipe:
    return _imagenet_statistics(
        _finetune(
            variant,
            batch_size=1024,
            lr=lr,
            warmup=warmup,
            epochs=epochs,
            layer_decay=layer_decay,
            drop_path=drop_path,
            mixed=True,
        )
    )


def beitv2_base_300e_ft1k() -> Recipe:
    """BEiT v2 B on ImageNet-1k, from 300 epochs of pre-training: 85.0 top-1."""
    return _v2(_BASE, lr=5e-4, warmup=20, epochs=100, layer_decay=0.65, drop_path=0.1)


def beitv2_base_ft1k() -> Recipe:
    """BEiT v2 B on ImageNet-1k, from 1600 epochs of pre-training: 85.5 top-1."""
    return _v2(_BASE, lr=5e-4, warmup=20, epochs=100, layer_decay=0.6, drop_path=0.2)


def beitv2_large_300e_ft1k() -> Recipe:
    """BEiT v2 L on ImageNet-1k, from 300 epochs of pre-training: 86.6 top-1."""
    return _v2(_LARGE, lr=5e-4, warmup=5, epochs=50, layer_decay=0.8, drop_path=0.2)


def beitv2_large_ft1k() -> Recipe:
    """BEiT v2 L on ImageNet-1k, from 1600 epochs of pre-training: 87.3 top-1."""
    return _v2(_LARGE, lr=2e-4, warmup=5, epochs=50, layer_decay=0.8, drop_path=0.2)


def _v2_21k(variant: str, *, drop_path: float) -> Recipe:
    recipe = _v2(variant, lr=6e-4, warmup=20, epochs=90, layer_decay=0.75, drop_path=drop_path)
    return replace(recipe, data=replace(recipe.data, batch_size=4096))


def beitv2_base_ft21k() -> Recipe:
    """BEiT v2 B on ImageNet-21k's 21,841 classes, from 1600 epochs of pre-training."""
    return _v2_21k("beit_base_patch16_224_pt22k_ft22k", drop_path=0.1)


def beitv2_large_ft21k() -> Recipe:
    """BEiT v2 L on ImageNet-21k's 21,841 classes, from 1600 epochs of pre-training."""
    return _v2_21k("beit_large_patch16_224_pt22k_ft22k", drop_path=0.2)


def beitv2_base_ft21k_ft1k() -> Recipe:
    """BEiT v2 B on ImageNet-1k by way of 21k classes: 86.5 top-1."""
    recipe = _v2(_BASE, lr=5e-5, warmup=20, epochs=30, layer_decay=0.75, drop_path=0.1)
    return replace(recipe, augment=AugmentOptions())


def beitv2_large_ft21k_ft1k() -> Recipe:
    """BEiT v2 L on ImageNet-1k by way of 21k classes: 88.4 top-1."""
    recipe = _v2(_LARGE, lr=7e-5, warmup=5, epochs=20, layer_decay=0.8, drop_path=0.25)
    return replace(recipe, augment=AugmentOptions())


# --- data2vec: fine-tuning normalises by 0.5, though pre-training used ImageNet's statistics.


def data2vec_base_ft1k() -> Recipe:
    """data2vec B on ImageNet-1k, from 800 epochs: 84.2 top-1 in the paper, 83.97 on the hub. 8 GPUs x 128."""
    return _finetune(
        "data2vec_vision_base_ft1k",
        batch_size=1024,
        lr=4e-3,
        warmup=10,
        epochs=100,
        layer_decay=0.65,
        drop_path=0.2,
        weight_decay=0.0,
        mixed=True,
    )


def data2vec_large_ft1k() -> Recipe:
    """data2vec L on ImageNet-1k, from 1600 epochs: 86.6 top-1. 16 GPUs x 64.

    The command there leaves its warmup a variable; 5 epochs are the default of its program.
    """
    return _finetune(
        "data2vec_vision_large_ft1k",
        batch_size=1024,
        lr=5e-3,
        warmup=5,
        epochs=50,
        layer_decay=0.65,
        drop_path=0.25,
        mixed=True,
    )


# --- Linear probes: a classifier on the frozen features of every block; the best block is reported.


def beit_base_linear() -> Recipe:
    """Linear probe of BEiT-B on ImageNet-1k (beit/run_linear_eval.py). 8 GPUs x 128. No published number."""
    return Recipe(
        name="",
        objective="linear_probe",
        model=ModelOptions(variant=_BASE, drop_path=0.0),
        data=DataOptions(batch_size=1024),
        augment=AugmentOptions(interpolation="bilinear", randaugment=None, erasing=0.0, smoothing=0.0),
        optim=OptimOptions(lr=4e-3, min_lr=0.0, epochs=100, warmup_epochs=0, weight_decay=1e-4),
    )


def beit_large_linear() -> Recipe:
    """Linear probe of BEiT-L on ImageNet-1k, as `beit_base_linear`."""
    recipe = beit_base_linear()
    return replace(recipe, model=replace(recipe.model, variant=_LARGE))


# --- Segmentation: UperNet on ADE20K, all with ImageNet's statistics, whatever the encoder was pre-trained with.

_ADE20K = 20_210
_BASE_ADE20K, _LARGE_ADE20K = "beit_base_patch16_640_ade20k", "beit_large_patch16_640_ade20k"


def _ade20k(variant: str, size: int, *, lr: float, layer_decay: float, drop_path: float, accumulate: int = 1) -> Recipe:
    """160,000 steps of 16 images, of which 1,500 are warmup: epochs that make exactly these of ADE20K's images."""
    batch_size = 16
    steps_per_epoch = _ADE20K // batch_size
    return Recipe(
        name="",
        objective="segmentation",
        model=ModelOptions(variant=variant, image_size=size, drop_path=drop_path),
        data=DataOptions(batch_size=batch_size, statistics="imagenet"),
        segment=SegmentationOptions(scale=(4 * size, size)),
        optim=OptimOptions(
            lr=lr,
            min_lr=0.0,
            epochs=160_000 / steps_per_epoch,
            warmup_epochs=1_500 / steps_per_epoch,
            warmup_lr=1e-6 * lr,
            schedule="poly",
            layer_decay=layer_decay,
            decay_class_token=True,
            accumulate=accumulate,
        ),
        run=RunOptions(eval_every_epochs=16_000 / steps_per_epoch),
    )


def beit_base_pt22k_ade20k() -> Recipe:
    """BEiT-B segments ADE20K at 512, from `beit_base_patch16_224_pt22k`. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=7e-4, layer_decay=0.65, drop_path=0.1)


def beit_base_ade20k() -> Recipe:
    """BEiT-B segments ADE20K at 512, from `beit_base_patch16_224_pt22k_ft22k`. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=3e-5, layer_decay=0.9, drop_path=0.1)


def beit_base_ade20k_640() -> Recipe:
    """BEiT-B segments ADE20K at 640, from `beit_base_patch16_224_pt22k_ft22k`: 53.6 mIoU. 8 GPUs x 2.

    53.61 mIoU, 64.82 mAcc, 84.62 aAcc at one scale; 54.2 mIoU over six scales and their mirror images.
    """
    return _ade20k(_BASE_ADE20K, 640, lr=3e-5, layer_decay=0.9, drop_path=0.1)


def beit_large_ade20k() -> Recipe:
    """BEiT-L segments ADE20K at 512, from `beit_large_patch16_224_pt22k_ft22k`. 8 GPUs x 2."""
    return _ade20k(_LARGE_ADE20K, 512, lr=2e-5, layer_decay=0.95, drop_path=0.2)


def beit_large_ade20k_640() -> Recipe:
    """BEiT-L segments ADE20K at 640, from `beit_large_patch16_224_pt22k_ft22k`: 56.7 mIoU. 8 GPUs x 1 x 2.

    57.0 mIoU over six scales and their mirror images. The 320,000 iterations of its config, 3,000 of them warmup, are
    half as many steps.
    """
    return _ade20k(_LARGE_ADE20K, 640, lr=2e-5, layer_decay=0.95, drop_path=0.2, accumulate=2)


def beitv2_base_ade20k() -> Recipe:
    """BEiT v2 B segments ADE20K at 512, from 1600 epochs of pre-training: 53.1 mIoU. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=5e-5, layer_decay=0.75, drop_path=0.15)


def beitv2_base_ft21k_ade20k() -> Recipe:
    """BEiT v2 B segments ADE20K at 512, by way of 21k classes: 53.5 mIoU. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=5e-5, layer_decay=0.85, drop_path=0.15)


def beitv2_large_ade20k() -> Recipe:
    """BEiT v2 L segments ADE20K at 512, from 1600 epochs of pre-training: 56.7 mIoU. 8 GPUs x 2."""
    return _ade20k(_LARGE_ADE20K, 512, lr=4e-5, layer_decay=0.9, drop_path=0.2)


def beitv2_large_ft21k_ade20k() -> Recipe:
    """BEiT v2 L segments ADE20K at 512, by way of 21k classes: 57.5 mIoU. 8 GPUs x 2.

    57.54 mIoU, 68.78 mAcc, 86.22 aAcc.
    """
    return _ade20k(_LARGE_ADE20K, 512, lr=3e-5, layer_decay=0.9, drop_path=0.2)


# --- Handwritten digits (scikit-learn): real training in minutes on two cores, without a network.


def digits_finetune() -> Recipe:
    """A classifier of 8x8 digits from a random start: at least 97 % of 450 held-out images, in minutes on a laptop.

    `beit-jax prepare digits DIR` makes the data.
    """
    return Recipe(
        name="",
        model=ModelOptions(variant="digits", drop_path=0.1, dtype="float32"),
        data=DataOptions(batch_size=32, eval_batch_size=90, workers=0),
        augment=AugmentOptions(
            crop_scale=(0.7, 1.0),
            crop_ratio=(0.85, 1.18),
            interpolation="bilinear",
            flip=0.0,
            randaugment=None,
            erasing=0.0,
        ),
        optim=OptimOptions(lr=2e-3, epochs=60, warmup_epochs=5, clip=1.0),
        run=RunOptions(log_every=20, save_every=400, eval_every_epochs=10),
    )


def digits_probe() -> Recipe:
    """Linear probe of every block of a digits classifier."""
    recipe = digits_finetune()
    return replace(
        recipe,
        objective="linear_probe",
        model=replace(recipe.model, drop_path=0.0),
        augment=replace(recipe.augment, smoothing=0.0),
        optim=OptimOptions(lr=3e-2, min_lr=0.0, epochs=20, warmup_epochs=0, weight_decay=1e-4),
    )


def _sized(recipe: Recipe, variant: str) -> Recipe:
    """The same recipe for a variant of another image size; its positions are resized when the checkpoint is read."""
    return replace(recipe, model=replace(recipe.model, variant=variant))


RECIPES: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        build.__name__: build
        for build in (
            beit_base_ft22k,
            beit_large_ft22k,
            beit_base_ft22k_ft1k,
            beit_base_ft22k_ft1k_384,
            beit_large_ft22k_ft1k,
            beit_large_ft22k_ft1k_384,
            beit_large_ft22k_ft1k_512,
            beit_base_ft1k,
            beit_large_ft1k,
            beitv2_base_300e_ft1k,
            beitv2_base_ft1k,
            beitv2_large_300e_ft1k,
            beitv2_large_ft1k,
            beitv2_base_ft21k,
            beitv2_large_ft21k,
            beitv2_base_ft21k_ft1k,
            beitv2_large_ft21k_ft1k,
            data2vec_base_ft1k,
            data2vec_large_ft1k,
            beit_base_linear,
            beit_large_linear,
            beit_base_pt22k_ade20k,
            beit_base_ade20k,
            beit_base_ade20k_640,
            beit_large_ade20k,
            beit_large_ade20k_640,
            beitv2_base_ade20k,
            beitv2_base_ft21k_ade20k,
            beitv2_large_ade20k,
            beitv2_large_ft21k_ade20k,
            *PRETRAINING,
            digits_finetune,
            digits_probe,
        )
    }
)


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        BeitJaxError: no such recipe; names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise BeitJaxError(
            f"no recipe is called {printable(name)}; the nearest is {near} (beit-jax train --help lists all)"
        )
    recipe = replace(RECIPES[name](), name=name)
    return recipe if name.startswith("digits") else _for_tpus(recipe)


def _for_tpus(recipe: Recipe) -> Recipe:
    """A published recipe laid out for the smallest slice of v5e, of 16 GB a chip, on which nothing else has to change.

    Blocks are computed again on the way back. Every chip holds the whole state, which takes the least time wherever it
    fits (benchmarks/scaling.md). benchmarks/aot.md has what the compiler says; with more memory, 80 GB say,
    ``--model.remat none`` saves a quarter of the products.
    """
    useless = recipe.objective in ("linear_probe", "dvae")  # no gradient goes through blocks
    recipe = replace(recipe, model=replace(recipe.model, remat="none" if useless else "block"))
    if recipe.objective == "segmentation":  # 16 images, in one part or two
        if recipe.optim.accumulate == 1:
            return replace(recipe, topology="v5e:4x4")
        return replace(recipe, topology="v5e:2x4", run=replace(recipe.run, mesh=(1, -1, 1)))
    many = recipe.data.batch_size >= 4096 or recipe.objective == "dvae"
    return replace(recipe, topology="v5e:8x8" if many or "_large" in recipe.model.variant else "v5e:4x4")
