"""Handwritten digits (scikit-learn's): real training in minutes on two cores, without a network.

In pre-training, at 16 pixels, a patch covers 2 x 2 of the scan's pixels.
"""

from dataclasses import replace

from ..objectives.classification import ClassificationRecipe
from ..objectives.data2vec import Data2vecOptions, Data2vecRecipe
from ..objectives.dvae import DvaeOptions, DvaeRecipe
from ..objectives.linear_probe import LinearProbeRecipe
from ..objectives.masked_tokens import MaskedTokensRecipe, TokenOptions
from ..recipe import AugmentOptions, CropOptions, DataOptions, MaskOptions, ModelOptions, OptimOptions, RunOptions

_DIGITS = CropOptions(
    crop_scale=(0.7, 1.0), crop_ratio=(0.85, 1.18), interpolation="bilinear", flip=0.0
)  # as `digits_finetune`
_DIGITS_RUN = RunOptions(log_every=20, save_every=1000, eval_every_epochs=20)


def digits_tokenizer() -> DvaeRecipe:
    """A small dVAE for 8x8 digits: 16 tokens an image."""
    return DvaeRecipe(
        model=ModelOptions(image_size=16, drop_path=0.0, dtype="float32"),
        data=DataOptions(batch_size=32, eval_batch_size=90, workers=0),
        augment=_DIGITS,
        dvae=DvaeOptions(
            vocab_size=64, width=16, groups=3, blocks=1, embedding=32, divergence=3.0, temperature_share=0.9
        ),
        optim=OptimOptions(lr=5e-3, epochs=15, warmup_epochs=1, weight_decay=1e-4, clip=1.0),
        run=_DIGITS_RUN,
    )


def digits_pretrain() -> MaskedTokensRecipe:
    """BEiT on 8x8 digits. `--tokenizer` is what `digits_tokenizer` made.

    Probe the result by `beit-jax train digits_probe --model.image-size 16 --init RUN/model`.
    """
    return MaskedTokensRecipe(
        published="digits",
        model=ModelOptions(image_size=16, drop_path=0.0, dtype="float32"),
        data=DataOptions(batch_size=32, eval_batch_size=90, workers=0),
        augment=_DIGITS,
        mask=MaskOptions(patches=6, min_block=2),
        tokens=TokenOptions(interpolation="bicubic"),
        optim=OptimOptions(lr=1.5e-3, min_lr=1e-5, epochs=100, warmup_epochs=5, clip=3.0),
        run=_DIGITS_RUN,
    )


def digits_data2vec() -> Data2vecRecipe:
    """data2vec on 8x8 digits, its teacher's decay growing from 0.99 to 0.999."""
    recipe = digits_pretrain()
    return recipe.derive(
        Data2vecRecipe,
        mask=MaskOptions(patches=9, min_block=2),
        data2vec=Data2vecOptions(target_layers=2, beta=2.0),
        optim=replace(recipe.optim, ema=0.999, ema_start=0.99, ema_steps=1000),
    )


def digits_finetune() -> ClassificationRecipe:
    """A classifier of 8x8 digits from a random start: at least 97 % of 450 held-out images, in minutes on a laptop.

    The data are made by `beit-jax prepare digits DIR`.
    """
    return ClassificationRecipe(
        published="digits",
        model=ModelOptions(drop_path=0.1, dtype="float32"),
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


def digits_probe() -> LinearProbeRecipe:
    """Linear probe of every block of a digits classifier."""
    recipe = digits_finetune()
    return recipe.derive(
        LinearProbeRecipe,
        model=replace(recipe.model, drop_path=0.0),
        augment=replace(recipe.augment, smoothing=0.0),
        optim=OptimOptions(lr=3e-2, min_lr=0.0, epochs=20, warmup_epochs=0, weight_decay=1e-4),
    )


RECIPES = (
    digits_tokenizer,
    digits_pretrain,
    digits_data2vec,
    digits_finetune,
    digits_probe,
)
