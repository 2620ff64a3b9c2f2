"""Segmentation of ADE20K by UperNet, all with ImageNet's statistics, whatever the encoder was pre-trained with.

Numbers: the configs of both semantic_segmentation folders of microsoft/unilm@768a3c8, and their README files.
"""

from ..objectives.segmentation import SegmentationOptions, SegmentationRecipe
from ..recipe import DataOptions, ModelOptions, OptimOptions, RunOptions

_ADE20K = 20_210
_BASE_ADE20K, _LARGE_ADE20K = "beit_base_patch16_640_ade20k", "beit_large_patch16_640_ade20k"


def _ade20k(
    variant: str, size: int, *, lr: float, layer_decay: float, drop_path: float, accumulate: int = 1
) -> SegmentationRecipe:
    """160,000 steps of 16 images, of which 1,500 are warmup: epochs that make exactly these of ADE20K's images."""
    batch_size = 16
    steps_per_epoch = _ADE20K // batch_size
    return SegmentationRecipe(
        published=variant,
        model=ModelOptions(image_size=size, drop_path=drop_path),
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


def beit_base_pt22k_ade20k() -> SegmentationRecipe:
    """BEiT-B segments ADE20K at 512, from `beit_base_patch16_224_pt22k`. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=7e-4, layer_decay=0.65, drop_path=0.1)


def beit_base_ade20k() -> SegmentationRecipe:
    """BEiT-B segments ADE20K at 512, from `beit_base_patch16_224_pt22k_ft22k`. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=3e-5, layer_decay=0.9, drop_path=0.1)


def beit_base_ade20k_640() -> SegmentationRecipe:
    """BEiT-B segments ADE20K at 640, from `beit_base_patch16_224_pt22k_ft22k`: 53.6 mIoU. 8 GPUs x 2.

    53.61 mIoU, 64.82 mAcc, 84.62 aAcc at one scale; 54.2 mIoU over six scales and their mirror images.
    """
    return _ade20k(_BASE_ADE20K, 640, lr=3e-5, layer_decay=0.9, drop_path=0.1)


def beit_large_ade20k() -> SegmentationRecipe:
    """BEiT-L segments ADE20K at 512, from `beit_large_patch16_224_pt22k_ft22k`. 8 GPUs x 2."""
    return _ade20k(_LARGE_ADE20K, 512, lr=2e-5, layer_decay=0.95, drop_path=0.2)


def beit_large_ade20k_640() -> SegmentationRecipe:
    """BEiT-L segments ADE20K at 640, from `beit_large_patch16_224_pt22k_ft22k`: 56.7 mIoU. 8 GPUs x 1 x 2.

    57.0 mIoU over six scales and their mirror images. The 320,000 iterations of its config, 3,000 of them warmup, are
    half as many steps.
    """
    return _ade20k(_LARGE_ADE20K, 640, lr=2e-5, layer_decay=0.95, drop_path=0.2, accumulate=2)


def beitv2_base_ade20k() -> SegmentationRecipe:
    """BEiT v2 B segments ADE20K at 512, from 1600 epochs of pre-training: 53.1 mIoU. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=5e-5, layer_decay=0.75, drop_path=0.15)


def beitv2_base_ft21k_ade20k() -> SegmentationRecipe:
    """BEiT v2 B segments ADE20K at 512, by way of 21k classes: 53.5 mIoU. 8 GPUs x 2."""
    return _ade20k(_BASE_ADE20K, 512, lr=5e-5, layer_decay=0.85, drop_path=0.15)


def beitv2_large_ade20k() -> SegmentationRecipe:
    """BEiT v2 L segments ADE20K at 512, from 1600 epochs of pre-training: 56.7 mIoU. 8 GPUs x 2."""
    return _ade20k(_LARGE_ADE20K, 512, lr=4e-5, layer_decay=0.9, drop_path=0.2)


def beitv2_large_ft21k_ade20k() -> SegmentationRecipe:
    """BEiT v2 L segments ADE20K at 512, by way of 21k classes: 57.5 mIoU. 8 GPUs x 2.

    57.54 mIoU, 68.78 mAcc, 86.22 aAcc.
    """
    return _ade20k(_LARGE_ADE20K, 512, lr=3e-5, layer_decay=0.9, drop_path=0.2)


RECIPES = (
    beit_base_pt22k_ade20k,
    beit_base_ade20k,
    beit_base_ade20k_640,
    beit_large_ade20k,
    beit_large_ade20k_640,
    beitv2_base_ade20k,
    beitv2_base_ft21k_ade20k,
    beitv2_large_ade20k,
    beitv2_large_ft21k_ade20k,
)
