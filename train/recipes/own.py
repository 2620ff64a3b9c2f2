"""Images of one's own, on one device: recipes whose numbers are choices for small data, not those of a published run.

Nothing in them belongs to a data set, a number of channels or an architecture: the model is the checkpoint's.
"""

from ..objectives.classification import ClassificationRecipe
from ..objectives.segmentation import SegmentationOptions, SegmentationRecipe
from ..recipe import AugmentOptions, DataOptions, ModelOptions, OptimOptions, RunOptions


def finetune() -> ClassificationRecipe:
    """A checkpoint of any architecture on images of one's own: a class for each, several classes, or numbers.

    For hundreds to some ten thousand images on one device. The first layers hardly move (layer decay 0.75), as in
    BEiT's fine-tuning, whose rate of 4e-3 for 1024 images is about this one for 64. Crops keep at least half of an
    image, and nothing but a flip changes it: colours and sizes may be what it shows. Targets are neither smoothed nor
    mixed, so that scores are probabilities and the loss is transformers' own. Pixels are normalised as the checkpoint
    was trained to see them. More data bear more: --augment.randaugment rand-m9-mstd0.5-inc1 --augment.mixup 0.8
    --augment.smoothing 0.1 --optim.epochs 100.
    """
    return ClassificationRecipe(
        model=ModelOptions(drop_path=0.1),
        data=DataOptions(batch_size=64, statistics="checkpoint"),
        augment=AugmentOptions(crop_scale=(0.5, 1.0), randaugment=None, erasing=0.0, smoothing=0.0),
        optim=OptimOptions(lr=2e-4, epochs=20, warmup_epochs=2, layer_decay=0.75),
        run=RunOptions(log_every=10, save_every=500),
    )


def segment() -> SegmentationRecipe:
    """A model segments images of one's own, of two classes or many, from any encoder at its own image size.

    For hundreds to some thousands of images (`beit-jax prepare segmentation`). --model.image-size 512 shows more detail
    than the 224 pixels of most checkpoints. Where classes are of very different sizes, --segment.loss
    cross_entropy+dice or --segment.class-weights balanced help the small ones.
    """
    return SegmentationRecipe(
        model=ModelOptions(drop_path=0.1),
        data=DataOptions(batch_size=8, statistics="imagenet"),
        segment=SegmentationOptions(scale=None, average="valid", taps="hf"),
        optim=OptimOptions(
            lr=1e-4,
            min_lr=0.0,
            epochs=50.0,
            warmup_epochs=2.0,
            warmup_lr=1e-7,
            schedule="poly",
            layer_decay=0.85,
            decay_class_token=True,
        ),
        run=RunOptions(eval_every_epochs=5.0, save_every=500, log_every=10),
    )


RECIPES = (finetune, segment)
