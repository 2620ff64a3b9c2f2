"""Training of tokenizers.

Numbers: microsoft/unilm@768a3c8 beit2/TOKENIZER.md; arXiv 2102.12092 appendix A for the dVAE. What the commands there
do not say is the default of their programs.
"""

from ..objectives.dvae import DvaeOptions, DvaeRecipe
from ..objectives.vqkd import VqkdOptions, VqkdRecipe
from ..recipe import CropOptions, DataOptions, ModelOptions, OptimOptions, RunOptions


def vqkd_base() -> VqkdRecipe:
    """BEiT v2's tokenizer, vqkd_encoder_base_decoder_3x768x12, on ImageNet-1k. 8 V100 x 64, 100 epochs.

    CLIP B/16 and DINO B/16 taught the published ones; `--teacher` is any native checkpoint.
    """
    return VqkdRecipe(
        published="beit_base_patch16_224_pt22k",
        model=ModelOptions(drop_path=0.0),
        data=DataOptions(batch_size=512),
        augment=CropOptions(),
        vqkd=VqkdOptions(),
        optim=OptimOptions(lr=2e-4, min_lr=1e-5, epochs=100, warmup_epochs=10, weight_decay=1e-4, beta2=0.99),
        run=RunOptions(eval_every_epochs=5.0),
    )


def dvae() -> DvaeRecipe:
    """A tokenizer of DALL-E's size, and its decoder, from one's own images at 112 pixels, 196 tokens each.

    The paper trained 3,000,000 steps of 512 images at 256 pixels on 250 million images; here the length is in epochs.
    """
    return DvaeRecipe(
        model=ModelOptions(image_size=112, drop_path=0.0, dtype="float32"),
        data=DataOptions(batch_size=512),
        augment=CropOptions(interpolation="lanczos"),
        dvae=DvaeOptions(),
        optim=OptimOptions(lr=1e-4, min_lr=1.25e-6, epochs=50, warmup_epochs=1, weight_decay=1e-4),
        run=RunOptions(eval_every_epochs=5.0),
    )


RECIPES = (
    vqkd_base,
    dvae,
)
