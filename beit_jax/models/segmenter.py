"""Dense prediction on the encoder: feature maps (`BeitBackbone`) and UperNet (`BeitForSemanticSegmentation`).

Sources: microsoft/unilm@768a3c8 beit/semantic_segmentation/backbone/beit.py; the heads as in UperNet (arXiv:1807.10221)
and PSPNet (arXiv:1612.01105), with the names and options of transformers 5.23.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.dense import (
    BatchNorm,
    ConvNorm,
    PixelClassifier,
    Upsample,
    adaptive_average_pool,
    map_size,
    max_pool,
    resize_bilinear,
)
from beit_jax.models.elementary import gelu
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import ArrayLike, BeitOutput, Remat, check_task, patch_grid
from beit_jax.models.position import check_known
from beit_jax.tree import Nested


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmenterOutput(BeitOutput):
    """`BeitOutput` with ``logits`` [b, h / 4, w / 4, classes] (for a patch of 16).

    Attributes:
        auxiliary_logits: [b, h / 16, w / 16, classes], or None for a model without auxiliary head.
    """

    auxiliary_logits: Float[Array, "b h w classes"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackboneOutput(BeitOutput):
    """`BeitOutput` with the feature maps.

    Attributes:
        feature_maps: one for every index of ``config.out_indices``: [b, rows, columns, d], or [b, 1 + patches, d] if
            ``config.reshape_hidden_states`` is false.
    """

    feature_maps: tuple[Float[Array, "b ..."], ...] = ()


class FeaturePyramid(nnx.Module):
    """Resizes four maps of the patch grid to 4, 2, 1 and 1/2 times its sides."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up4_first = Upsample(features, dtype=dtype, rngs=rngs)
        self.up4_norm = BatchNorm(features)
        self.up4_second = Upsample(features, dtype=dtype, rngs=rngs)
        self.up2 = Upsample(features, dtype=dtype, rngs=rngs)

    def __call__(self, maps: list[Float[Array, "b h w d"]], train: bool) -> list[Float[Array, "b _h _w d"]]:
        check_known(map_size(maps[0]), "the feature pyramid and the heads on it")
        if min(maps[0].shape[1:3]) < 2:
            raise BeitJaxError(f"the feature pyramid needs at least 2x2 patches, found {maps[0].shape[1:3]}")
        up4 = self.up4_norm(self.up4_first(maps[0]), train)
        up4 = self.up4_second(gelu(up4))
        return [up4, self.up2(maps[1]), maps[2], max_pool(maps[3])]


class UperHead(nnx.Module):
    """UperNet: pyramid pooling of the coarsest map, sums from coarse to fine, a fusion of all levels at the finest."""

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, scales = config.hidden_size, config.pool_scales
        for i in range(len(scales)):
            setattr(self, f"pool_{i}", ConvNorm(d, d, 1, dtype=dtype, rngs=rngs))
        self.bottleneck = ConvNorm((1 + len(scales)) * d, d, 3, dtype=dtype, rngs=rngs)
        for i in range(3):
            setattr(self, f"lateral_{i}", ConvNorm(d, d, 1, dtype=dtype, rngs=rngs))
            setattr(self, f"smooth_{i}", ConvNorm(d, d, 3, dtype=dtype, rngs=rngs))
        self.fuse = ConvNorm(4 * d, d, 3, dtype=dtype, rngs=rngs)
        self.classifier = PixelClassifier(d, config.num_labels, dtype=dtype, rngs=rngs)
        self.pool_scales, self.chained = scales, config.chained_pooling

    def __call__(
        self, maps: list[Float[Array, "b _h _w d"]], train: bool, key: Key[Array, ""] | None
    ) -> Float[Array, "b h w classes"]:
        levels = [getattr(self, f"lateral_{i}")(maps[i], train) for i in range(3)]
        levels.append(self.pooled(maps[3], train))
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize_bilinear(levels[i + 1], map_size(levels[i]))
        levels[:3] = [getattr(self, f"smooth_{i}")(levels[i], train) for i in range(3)]
        finest = map_size(levels[0])
        fused = self.fuse(jnp.concatenate([resize_bilinear(level, finest) for level in levels], axis=-1), train)
        return self.classifier(fused, key)

    def pooled(self, x: Float[Array, "b h w d"], train: bool) -> Float[Array, "b h w d"]:
        """The coarsest map, fused with its averages over 1, 2 x 2, 3 x 3 and 6 x 6 bins, in as many channels."""
        parts, read = [], x
        for i, scale in enumerate(self.pool_scales):
            bins = getattr(self, f"pool_{i}")(adaptive_average_pool(read, scale), train)
            parts.append(resize_bilinear(bins, map_size(x)))
            read = bins if self.chained else x
        return self.bottleneck(jnp.concatenate([x, *parts], axis=-1), train)


class FCNHead(nnx.Module):
    """Convolutions and a classifier on one map: the auxiliary head, which only the loss uses."""

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.auxiliary_channels
        for i in range(config.auxiliary_num_convs):
            inputs = config.hidden_size if i == 0 else width
            setattr(self, f"conv_{i}", ConvNorm(inputs, width, 3, dtype=dtype, rngs=rngs))
        if config.auxiliary_concat_input:
            self.concat = ConvNorm(config.hidden_size + width, width, 3, dtype=dtype, rngs=rngs)
        self.classifier = PixelClassifier(width, config.num_labels, dtype=dtype, rngs=rngs)
        self.num_convs, self.concat_input = config.auxiliary_num_convs, config.auxiliary_concat_input

    def __call__(
        self, x: Float[Array, "b h w d"], train: bool, key: Key[Array, ""] | None
    ) -> Float[Array, "b h w classes"]:
        out = x
        for i in range(self.num_convs):
            out = getattr(self, f"conv_{i}")(out, train)
        if self.concat_input:
            out = self.concat(jnp.concatenate([x, out], axis=-1), train)
        return self.classifier(out, key)


class BeitBackbone(nnx.Module):
    """The encoder as a source of feature maps, see `BackboneOutput`. Source: transformers 5.23 `BeitBackbone`."""

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        check_task(config, "backbone")
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        if config.add_fpn:
            self.fpn = FeaturePyramid(config.hidden_size, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None = None,
        *,
        train: bool = False,
        key: Key[Array, ""] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        remat: Remat = "none",
    ) -> BackboneOutput:
        """As `BeitModel.__call__`; `train` as in `BeitForSemanticSegmentation.__call__`."""
        output = self.beit(
            pixel_values,
            bool_masked_pos,
            key=key,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            taps=self.config.tapped_states,
            remat=remat,
        )
        assert output.taps is not None
        if not self.config.reshape_hidden_states:
            return _extended(BackboneOutput, output, feature_maps=tuple(output.taps))
        maps = feature_maps(self.config, pixel_values.shape, output.taps)
        if self.config.add_fpn:
            maps = self.fpn(maps, train)
        return _extended(BackboneOutput, output, feature_maps=tuple(maps))


class BeitForSemanticSegmentation(nnx.Module):
    """UperNet on BEiT: ``logits`` [b, h / 4, w / 4, num_labels], in the order of ``config.labels``.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation; transformers 5.23 `BeitForSemanticSegmentation`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        check_task(config, "semantic_segmentation")
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        self.fpn = FeaturePyramid(config.hidden_size, dtype=dtype, rngs=rngs)
        self.decode_head = UperHead(config, dtype=dtype, rngs=rngs)
        if config.use_auxiliary_head:
            self.auxiliary_head = FCNHead(config, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None = None,
        *,
        train: bool = False,
        key: Key[Array, ""] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        remat: Remat = "none",
    ) -> SegmenterOutput:
        """As `BeitModel.__call__`, with the logits of both heads.

        Args:
            train: True to normalise by the statistics of the batch and to move the running statistics. This changes the
                module: a traced function must merge the module inside, and return ``batch_statistics(model)``.
            key: as in `BeitModel`; also the randomness of the dropout of channels before the classifiers.

        Raises:
            BeitJaxError: as `BeitModel.__call__`; fewer than 2 x 2 patches; training on a single image.
        """
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        output = self.beit(
            pixel_values,
            bool_masked_pos,
            key=keys[0],
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            taps=self.config.tapped_states,
            remat=remat,
        )
        assert output.taps is not None
        maps = self.fpn(feature_maps(self.config, pixel_values.shape, output.taps), train)
        auxiliary = self.auxiliary_head(maps[2], train, keys[2]) if self.config.use_auxiliary_head else None
        logits = self.decode_head(maps, train, keys[1])
        return _extended(SegmenterOutput, output, logits=logits, auxiliary_logits=auxiliary)


def feature_maps(
    config: BeitConfig, pixel_shape: tuple[int, ...], taps: Float[Array, "taps b n d"]
) -> list[Float[Array, "b rows columns d"]]:
    """The patch tokens of sequences (class token first) as maps of the patch grid."""
    grid = patch_grid(config, pixel_shape)
    return [tokens[:, 1:].reshape(tokens.shape[0], *grid, tokens.shape[-1]) for tokens in taps]


def batch_statistics(model: nnx.Module) -> Nested:
    """The running statistics of a model, nested as its parameters are. Training carries them beside the parameters."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def _extended(kind: Any, output: BeitOutput, **values: Any) -> Any:
    """The output of the encoder as a subclass of `BeitOutput`, with the values of the subclass."""
    return kind(**{field.name: getattr(output, field.name) for field in fields(output)} | {"taps": None} | values)
