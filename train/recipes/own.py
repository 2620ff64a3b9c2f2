"""Images of one's own, on one device: recipes whose numbers are choices for small data, not those of a published run.

Nothing in them belongs to a data set, a number of channels or an architecture: the model is the checkpoint's.
"""

from ..objectives.classification import ClassificationRecipe
from ..recipe import AugmentOptions, DataOptions, ModelOptions, OptimOptions, RunOptions


def finetune() -> ClassificationRecipe:
    """A checkpoint of any architecture on images of one's own: a class for each, several classes, or numbers.

    For hundreds to some ten thousand images on one device. The first layers hardly move (layer decay 0.75), as in BEiT's
    fine-tuning, whose rate of 4e-3 for 1024 images is about this one for 64. Crops keep at least half of an image, and
    nothing but a flip changes it: colours and sizes may be what it is about. Targets are neither smoothed nor mixed, so
    that scores are probabilities and the loss is transformers' own. More data bear more: --augment.randaugment
    rand-m9-mstd0.5-inc1 --augment.mixup 0.8 --augment.smoothing 0.1 --optim.epochs 100.
    """
    return ClassificationRecipe(
        model=ModelOptions(drop_path=0.1),
        data=DataOptions(batch_size=64),
        augment=AugmentOptions(crop_scale=(0.5, 1.0), randaugment=None, erasing=0.0, smoothing=0.0),
        optim=OptimOptions(lr=2e-4, epochs=20, warmup_epochs=2, layer_decay=0.75),
        run=RunOptions(log_every=10, save_every=500),
    )


RECIPES = (finetune,)
