"""Pre-training on visual tokens and on a teacher's features.

Numbers: microsoft/unilm@768a3c8 beit/README.md, beit/get_started_for_pretraining.md and beit2/PRETRAINING.md;
facebookresearch/data2vec_vision@af9a363 beit/README.md. What the commands there do not say is the default of their
programs. Learning rates are not scaled by batches.
"""

from dataclasses import replace

from ..objectives.data2vec import Data2vecOptions, Data2vecRecipe
from ..objectives.masked_tokens import MaskedTokensRecipe, TokenOptions
from ..recipe import CropOptions, DataOptions, MaskOptions, ModelOptions, OptimOptions, RunOptions

_IMAGENET22K = 14_197_122
_VIEWS = CropOptions(color_jitter=0.4)


def _beit(variant: str, *, epochs: float, warmup: float) -> MaskedTokensRecipe:
    """A line of BEiT's pre-training: 2048 images a step, 75 of 196 patches hidden."""
    return MaskedTokensRecipe(
        published=variant,
        model=ModelOptions(drop_path=0.1),
        data=DataOptions(batch_size=2048),
        augment=_VIEWS,
        optim=OptimOptions(lr=1.5e-3, min_lr=1e-5, epochs=epochs, warmup_epochs=warmup, clip=3.0),
        run=RunOptions(eval_every_epochs=5.0),
    )


def _imagenet_statistics(recipe: MaskedTokensRecipe) -> MaskedTokensRecipe:
    return replace(recipe, data=replace(recipe.data, statistics="imagenet"))


def beit_base_pt22k() -> MaskedTokensRecipe:
    """BEiT-B on ImageNet-22k: `beit_base_patch16_224_pt22k`. 16 V100 x 128, 150 epochs, 10,000 steps of warmup.

    Its --tokenizer is DALL-E's encoder, converted.
    """
    return _beit("beit_base_patch16_224_pt22k", epochs=150, warmup=10_000 / (_IMAGENET22K // 2048))


def beit_large_pt22k() -> MaskedTokensRecipe:
    """BEiT-L on ImageNet-22k: `beit_large_patch16_224_pt22k`. As `beit_base_pt22k`; its command was never published.

    Layer scale starts at 1e-5, which is published. Blocks are computed again on the way back, to fit into 16 GB.
    """
    return replace(beit_base_pt22k(), published="beit_large_patch16_224_pt22k")


def beit_base_pt1k() -> MaskedTokensRecipe:
    """BEiT-B on ImageNet-1k for 800 epochs, with shared position bias. 16 V100 x 128."""
    return _imagenet_statistics(_beit("beit_base_patch16_224_pt22k", epochs=800, warmup=10))


def beit_base_pt1k_800ep() -> MaskedTokensRecipe:
    """The model that attention maps were published of: absolute positions, no layer scale. As `beit_base_pt1k`."""
    return _imagenet_statistics(_beit("beit_base_patch16_224_pt1k_800ep", epochs=800, warmup=10))


# --- BEiT v2: the tokens of VQ-KD, exactly 75 patches, and two more blocks that read the ninth (of L: the 21st).


def _beitv2(variant: str, *, epochs: float, aggregate_from: int, drop_path: float, beta2: float) -> MaskedTokensRecipe:
    recipe = _imagenet_statistics(_beit(variant, epochs=epochs, warmup=10))
    return replace(
        recipe,
        model=replace(recipe.model, drop_path=drop_path),
        augment=replace(recipe.augment, crop_scale=(0.2, 1.0)),
        mask=MaskOptions(exact=True),
        tokens=TokenOptions(interpolation="bicubic", aggregate_from=aggregate_from, aggregation_layers=2),
        optim=replace(recipe.optim, beta2=beta2),
    )


def beitv2_base_pt1k() -> MaskedTokensRecipe:
    """BEiT v2 B on ImageNet-1k, 1600 epochs: 85.5 top-1 fine-tuned. 16 V100 x 128.

    Its --tokenizer is vqkd_encoder_base_decoder_3x768x12_clip, converted.
    """
    return _beitv2("beit_base_patch16_224_pt22k", epochs=1600, aggregate_from=9, drop_path=0.1, beta2=0.999)


def beitv2_base_pt1k_300e() -> MaskedTokensRecipe:
    """BEiT v2 B on ImageNet-1k, 300 epochs: 85.0 top-1 fine-tuned."""
    return _beitv2("beit_base_patch16_224_pt22k", epochs=300, aggregate_from=9, drop_path=0.0, beta2=0.98)


def beitv2_large_pt1k() -> MaskedTokensRecipe:
    """BEiT v2 L on ImageNet-1k, 1600 epochs: 87.3 top-1 fine-tuned. 64 V100 x 32."""
    return _beitv2("beit_large_patch16_224_pt22k", epochs=1600, aggregate_from=21, drop_path=0.1, beta2=0.999)


def beitv2_large_pt1k_300e() -> MaskedTokensRecipe:
    """BEiT v2 L on ImageNet-1k, 300 epochs: 86.6 top-1 fine-tuned."""
    return _beitv2("beit_large_patch16_224_pt22k", epochs=300, aggregate_from=21, drop_path=0.0, beta2=0.98)


# --- data2vec: 120 of 196 patches, the last six blocks of a teacher of constant decay.


def _data2vec(
    variant: str, model: ModelOptions, *, batch_size: int, lr: float, warmup: float, ema: float
) -> Data2vecRecipe:
    return Data2vecRecipe(
        published=variant,
        model=model,
        data=DataOptions(batch_size=batch_size, statistics="imagenet"),
        augment=_VIEWS,
        mask=MaskOptions(patches=120, max_block=196),
        data2vec=Data2vecOptions(target_layers=6, beta=2.0),
        optim=OptimOptions(lr=lr, min_lr=1e-5, epochs=800, warmup_epochs=warmup, clip=3.0, ema=ema),
        run=RunOptions(eval_every_epochs=5.0),
    )


def data2vec_base_800() -> Data2vecRecipe:
    """data2vec B on ImageNet-1k, 800 epochs: 84.2 top-1 fine-tuned. 16 GPUs x 128."""
    model = ModelOptions(drop_path=0.25, attention_dropout=0.05)
    return _data2vec("data2vec_vision_base", model, batch_size=2048, lr=2e-3, warmup=10, ema=0.9998)


def data2vec_large_800() -> Data2vecRecipe:
    """data2vec L on ImageNet-1k, the first 800 epochs. 64 GPUs x 64."""
    model = ModelOptions(drop_path=0.2, attention_dropout=0.15, layer_scale=1e-5)
    return _data2vec("data2vec_vision_large", model, batch_size=4096, lr=1e-3, warmup=80, ema=0.9998)


def data2vec_large_1600() -> Data2vecRecipe:
    """data2vec L, 800 epochs more: 86.6 top-1 fine-tuned. `--init` is what the first stage left in ``student/``.

    The teacher starts as a copy of that student, with a slower decay.
    """
    recipe = data2vec_large_800()
    return replace(recipe, optim=replace(recipe.optim, warmup_epochs=40, ema=0.9999))


RECIPES = (
    beit_base_pt22k,
    beit_large_pt22k,
    beit_base_pt1k,
    beit_base_pt1k_800ep,
    beitv2_base_pt1k,
    beitv2_base_pt1k_300e,
    beitv2_large_pt1k,
    beitv2_large_pt1k_300e,
    data2vec_base_800,
    data2vec_large_800,
    data2vec_large_1600,
)
