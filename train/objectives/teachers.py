"""Teachers of BEiT v2's tokenizer: frozen networks whose features of patches it learns to rebuild."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.elementary import layer_norm
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import abstract_module, patch_grid
from beit_jax.tree import Nested, flatten, unflatten
from beit_jax.weights.native import NativeCheckpoint


@runtime_checkable
class Teacher(Protocol):
    """Images to features of their patches.

    Any `nnx.Module` of this kind serves: CLIP's image tower with its projection and DINO's ViT, which taught the
    published tokenizers, as well as an encoder of this library (`EncoderTeacher`). Split it by ``nnx.split``: the graph
    is `vqkd`'s argument, the variables as a pure dict are what the state keeps beside the parameters. A network of
    another patch or input size resizes images or features itself: its grid must be the tokenizer's.

    Attributes:
        target_size: dimensions of a feature.
    """

    @property
    def target_size(self) -> int: ...

    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b rows columns t"]:
        """Features, float32, of images in [0, 1], which the teacher normalises as it needs them. Traceable."""


class EncoderTeacher(nnx.Module):
    """An encoder of this library as a `Teacher`: its last hidden state, as its own task reads patches.

    That is normalised by the norm before the head of a model for masked images, or by the final norm of a model that
    pools its class token. A model that pools the mean of patches has no norm for each, and the state is left as it is.

    Args:
        mean, std: of the checkpoint's processor; None where that does not normalise.
        dtype: what matrix products compute in; the features are float32.
        rngs: draws the initial parameters.
    """

    def __init__(
        self,
        config: BeitConfig,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        if config.task == "masked_image_modeling":
            self.norm = layer_norm(config, rngs)
        self.config = config
        self.mean = tuple(mean or (0.0,) * config.num_channels)
        self.std = tuple(std or (1.0,) * config.num_channels)

    @property
    def target_size(self) -> int:
        return self.config.hidden_size

    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b rows columns t"]:
        """As `Teacher.__call__`.

        Raises:
            BeitJaxError: wrong shapes, see `beit_jax.models.interface.patch_grid`.
        """
        rows, columns = patch_grid(self.config, pixel_values.shape)
        hidden = self.beit((pixel_values - jnp.asarray(self.mean)) / jnp.asarray(self.std)).last_hidden_state
        patches = self.norm(hidden[:, 1:]) if self.config.task == "masked_image_modeling" else hidden[:, 1:]
        return patches.astype(jnp.float32).reshape(len(patches), rows, columns, self.target_size)


def abstract_teacher(
    config: BeitConfig,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[nnx.GraphDef[EncoderTeacher], Nested]:
    """The graph of an `EncoderTeacher` of these arguments, and the shapes of its parameters, nested."""
    return abstract_module(lambda: EncoderTeacher(config, mean, std, dtype=dtype, rngs=nnx.Rngs(0)))


def teacher_params(checkpoint: NativeCheckpoint) -> Nested:
    """The parameters of the `EncoderTeacher` that a checkpoint makes, float32 NumPy arrays: all but its head's.

    Raises:
        BeitJaxError: the checkpoint lacks tensors of its own configuration.
    """
    config, processor = checkpoint.config, checkpoint.processor
    # A model that is only an encoder has its names bare.
    prefix = "beit/" if config.task == "features" else ""
    found = {prefix + name: leaf for name, leaf in checkpoint.params.items()}
    shapes = flatten(abstract_teacher(config, processor.mean, processor.std)[1])
    for name, shape in shapes.items():
        have = list(found[name].shape) if name in found else "nothing"
        if have != list(shape.shape):
            raise BeitJaxError(
                f"teacher: {printable(name)}: expected {list(shape.shape)} by the checkpoint's own configuration, "
                f"found {have}; convert it again"
            )
    return unflatten({name: np.asarray(found[name], np.float32) for name in shapes})
