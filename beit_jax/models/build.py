"""The model of a configuration: its class, the shapes of its parameters, and the model built from parameters."""

from collections.abc import Mapping
from functools import lru_cache
from math import prod

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from beit_jax.config import BeitConfig, Task
from beit_jax.kernels.cpu import library
from beit_jax.models.classifier import BeitForImageClassification
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import abstract_module
from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
from beit_jax.models.segmenter import BeitBackbone, BeitForSemanticSegmentation, batch_statistics
from beit_jax.tree import Nested, flatten

Model = BeitModel | BeitForMaskedImageModeling | BeitForImageClassification | BeitForSemanticSegmentation | BeitBackbone

library.offer()

MODELS: Mapping[Task, type[Model]] = {
    "features": BeitModel,
    "masked_image_modeling": BeitForMaskedImageModeling,
    "image_classification": BeitForImageClassification,
    "semantic_segmentation": BeitForSemanticSegmentation,
    "backbone": BeitBackbone,
}


def abstract_model(
    config: BeitConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    residual: DTypeLike = jnp.float32,
    fixed_blocks: tuple[int, ...] = (),
) -> tuple[nnx.GraphDef[Model], Nested]:
    """The model of a configuration without arrays, see `beit_jax.models.interface.abstract_module`.

    Running statistics of batch norm stand among the parameters; `statistics` names them.

    Args:
        dtype: of matrix products.
        residual: dtype of the stream between the encoder's blocks.
        fixed_blocks: numbers of the blocks, from 0, whose parameters have no gradient, see `interface.scan`.
    """

    def make() -> Model:
        model = MODELS[config.task](config, dtype=dtype, rngs=nnx.Rngs(0))
        encoder = model if isinstance(model, BeitModel) else model.beit
        encoder.fixed_blocks, encoder.residual = fixed_blocks, jnp.dtype(residual)
        return model

    return abstract_module(make)


@lru_cache(maxsize=8)
def param_shapes(config: BeitConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of the model, and of every running statistic, by its flat name."""
    return {name: leaf.shape for name, leaf in flatten(abstract_model(config)[1]).items()}


@lru_cache(maxsize=8)
def statistics(config: BeitConfig) -> frozenset[str]:
    """The names in `param_shapes` that are running statistics: state of training that no gradient moves."""
    model = nnx.eval_shape(lambda: MODELS[config.task](config, rngs=nnx.Rngs(0)))
    return frozenset(flatten(batch_statistics(model)))


def num_params(config: BeitConfig) -> int:
    """The count of all numbers that training learns: the parameters, without running statistics."""
    learned = param_shapes(config).keys() - statistics(config)
    return sum(prod(param_shapes(config)[name]) for name in learned)


def build_model(config: BeitConfig, params: Nested, *, dtype: DTypeLike = jnp.float32) -> Model:
    """The model with these (nested) parameters; works inside `jax.jit` as well."""
    return nnx.merge(abstract_model(config, dtype=dtype)[0], params)
