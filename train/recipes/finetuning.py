"""Fine-tuning of classifiers, one function a line of the original tables, and linear probes.

Numbers: microsoft/unilm@768a3c8 beit/README.md and beit/get_started_for_image_classification.md, beit2/README.md and
beit2/get_started_for_image_classification.md; facebookresearch/data2vec_vision@af9a363 beit/README.md. What the
commands there do not say is the default of their run_class_finetuning.py, which the dataclasses of options hold.
"""

from dataclasses import replace

from ..objectives.classification import ClassificationRecipe
from ..objectives.linear_probe import LinearProbeRecipe
from ..recipe import AugmentOptions, DataOptions, ModelOptions, OptimOptions

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
) -> ClassificationRecipe:
    """A line of the fine-tuning tables."""
    return ClassificationRecipe(
        published=variant,
        model=ModelOptions(drop_path=drop_path, image_size=image_size),
        data=DataOptions(batch_size=batch_size),
        augment=_MIXED if mixed else AugmentOptions(),
        optim=OptimOptions(
            lr=lr, warmup_epochs=warmup, epochs=epochs, layer_decay=layer_decay, weight_decay=weight_decay
        ),
    )


def _imagenet_statistics(recipe: ClassificationRecipe) -> ClassificationRecipe:
    return replace(recipe, data=replace(recipe.data, statistics="imagenet"))


# --- BEiT: pre-trained on ImageNet-22k, then fine-tuned there ("intermediate"), then on ImageNet-1k.


def beit_base_ft22k() -> ClassificationRecipe:
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


def beit_large_ft22k() -> ClassificationRecipe:
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


def beit_base_ft22k_ft1k() -> ClassificationRecipe:
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


def beit_base_ft22k_ft1k_384() -> ClassificationRecipe:
    """BEiT-B at 384 on ImageNet-1k, from `beit_base_patch16_224_pt22k_ft22k`: 86.8 top-1."""
    return _sized(beit_base_ft22k_ft1k(), "beit_base_patch16_384")


def beit_large_ft22k_ft1k() -> ClassificationRecipe:
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


def beit_large_ft22k_ft1k_384() -> ClassificationRecipe:
    """BEiT-L at 384 on ImageNet-1k, from `beit_large_patch16_224_pt22k_ft22k`: 88.4 top-1."""
    return _sized(beit_large_ft22k_ft1k(), "beit_large_patch16_384")


def beit_large_ft22k_ft1k_512() -> ClassificationRecipe:
    """BEiT-L at 512 on ImageNet-1k, from `beit_large_patch16_224_pt22k_ft22k`: 88.60 top-1."""
    return _sized(beit_large_ft22k_ft1k(), "beit_large_patch16_512")


def beit_base_ft1k() -> ClassificationRecipe:
    """BEiT-B at 224 on ImageNet-1k, from `beit_base_patch16_224_pt22k`: 83.7 top-1. 8 GPUs x 128."""
    return _finetune(
        _BASE, batch_size=1024, lr=4e-3, warmup=20, epochs=100, layer_decay=0.65, drop_path=0.1, mixed=True
    )


def beit_large_ft1k() -> ClassificationRecipe:
    """BEiT-L at 224 on ImageNet-1k, from `beit_large_patch16_224_pt22k`: 86.0 top-1. 8 GPUs x 64 x 2."""
    recipe = _finetune(
        _LARGE, batch_size=1024, lr=1e-3, warmup=5, epochs=50, layer_decay=0.75, drop_path=0.2, mixed=True
    )
    return replace(recipe, optim=replace(recipe.optim, accumulate=2))


# --- BEiT v2: ImageNet's statistics; from pre-training of 300 or 1600 epochs, or by way of 21k classes.


def _v2(
    variant: str, *, lr: float, warmup: float, epochs: float, layer_decay: float, drop_path: float
) -> ClassificationRecipe:
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


def beitv2_base_300e_ft1k() -> ClassificationRecipe:
    """BEiT v2 B on ImageNet-1k, from 300 epochs of pre-training: 85.0 top-1."""
    return _v2(_BASE, lr=5e-4, warmup=20, epochs=100, layer_decay=0.65, drop_path=0.1)


def beitv2_base_ft1k() -> ClassificationRecipe:
    """BEiT v2 B on ImageNet-1k, from 1600 epochs of pre-training: 85.5 top-1."""
    return _v2(_BASE, lr=5e-4, warmup=20, epochs=100, layer_decay=0.6, drop_path=0.2)


def beitv2_large_300e_ft1k() -> ClassificationRecipe:
    """BEiT v2 L on ImageNet-1k, from 300 epochs of pre-training: 86.6 top-1."""
    return _v2(_LARGE, lr=5e-4, warmup=5, epochs=50, layer_decay=0.8, drop_path=0.2)


def beitv2_large_ft1k() -> ClassificationRecipe:
    """BEiT v2 L on ImageNet-1k, from 1600 epochs of pre-training: 87.3 top-1."""
    return _v2(_LARGE, lr=2e-4, warmup=5, epochs=50, layer_decay=0.8, drop_path=0.2)


def _v2_21k(variant: str, *, drop_path: float) -> ClassificationRecipe:
    recipe = _v2(variant, lr=6e-4, warmup=20, epochs=90, layer_decay=0.75, drop_path=drop_path)
    return replace(recipe, data=replace(recipe.data, batch_size=4096))


def beitv2_base_ft21k() -> ClassificationRecipe:
    """BEiT v2 B on ImageNet-21k's 21,841 classes, from 1600 epochs of pre-training."""
    return _v2_21k("beit_base_patch16_224_pt22k_ft22k", drop_path=0.1)


def beitv2_large_ft21k() -> ClassificationRecipe:
    """BEiT v2 L on ImageNet-21k's 21,841 classes, from 1600 epochs of pre-training."""
    return _v2_21k("beit_large_patch16_224_pt22k_ft22k", drop_path=0.2)


def beitv2_base_ft21k_ft1k() -> ClassificationRecipe:
    """BEiT v2 B on ImageNet-1k by way of 21k classes: 86.5 top-1."""
    recipe = _v2(_BASE, lr=5e-5, warmup=20, epochs=30, layer_decay=0.75, drop_path=0.1)
    return replace(recipe, augment=AugmentOptions())


def beitv2_large_ft21k_ft1k() -> ClassificationRecipe:
    """BEiT v2 L on ImageNet-1k by way of 21k classes: 88.4 top-1."""
    recipe = _v2(_LARGE, lr=7e-5, warmup=5, epochs=20, layer_decay=0.8, drop_path=0.25)
    return replace(recipe, augment=AugmentOptions())


# --- data2vec: fine-tuning normalises by 0.5, though pre-training used ImageNet's statistics.


def data2vec_base_ft1k() -> ClassificationRecipe:
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


def data2vec_large_ft1k() -> ClassificationRecipe:
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


def beit_base_linear() -> LinearProbeRecipe:
    """Linear probe of BEiT-B on ImageNet-1k (beit/run_linear_eval.py). 8 GPUs x 128. No published number."""
    return LinearProbeRecipe(
        published=_BASE,
        model=ModelOptions(drop_path=0.0),
        data=DataOptions(batch_size=1024),
        augment=AugmentOptions(interpolation="bilinear", randaugment=None, erasing=0.0, smoothing=0.0),
        optim=OptimOptions(lr=4e-3, min_lr=0.0, epochs=100, warmup_epochs=0, weight_decay=1e-4),
    )


def beit_large_linear() -> LinearProbeRecipe:
    """Linear probe of BEiT-L on ImageNet-1k, as `beit_base_linear`."""
    return replace(beit_base_linear(), published=_LARGE)


def _sized(recipe: ClassificationRecipe, variant: str) -> ClassificationRecipe:
    """The same recipe for a variant of another image size; its positions are resized when the checkpoint is read."""
    return replace(recipe, published=variant)


RECIPES = (
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
)
