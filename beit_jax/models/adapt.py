"""A checkpoint for another input size, patch size or number of channels, or with one bias table per layer.

Only position tables and the patch projection depend on these. Every other leaf stays as it is. JAX is imported where a
table is resized: a conversion that changes no size needs none, and JAX takes a second.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import DTypeLike

from beit_jax.config import BeitConfig, PositionResize
from beit_jax.errors import BeitJaxError
from beit_jax.resize import antialiased_bicubic_matrix, geometric_grid

Grid = tuple[int, int]  # patches, (rows, columns)
Leaves = Mapping[str, np.ndarray]
Adaptation = Callable[[Leaves], np.ndarray]


def adaptations(
    source: BeitConfig,
    target: BeitConfig,
    *,
    channels_from: tuple[int, ...] | None = None,
    stored: DTypeLike = np.float32,
) -> dict[str, tuple[tuple[str, ...], Adaptation]]:
    """For every leaf of the target that differs from the source's: the source leaves that it is made from, and the
    function that makes it of them.

    Args:
        channels_from, stored: as `origin` and `stored` of `channel_kernel`, for a kernel of other channels.

    Raises:
        BeitJaxError: the target's position bias cannot be made from the source's.
    """
    parent = "" if source.task == "features" else "beit/"
    shared, layer = parent + "shared_bias_table", parent + "blocks/attention/bias_table"
    stacks = {layer: source.num_hidden_layers}  # the number of blocks of every leaf that holds one table per block
    if source.aggregation_layers:
        stacks["aggregation/blocks/attention/bias_table"] = source.aggregation_layers
    result: dict[str, tuple[tuple[str, ...], Adaptation]] = {}
    resize = partial(resize_table, source=source.grid, target=target.grid, method=target.position_resize)
    if source.position_bias != target.position_bias:
        if (source.position_bias, target.position_bias) != ("shared", "per_layer"):
            change = f"{source.position_bias} cannot become {target.position_bias}"
            raise BeitJaxError(f"position bias {change}; only shared can become per_layer: leave --position-bias out")
        # Fine-tuning starts every layer from the table that pre-training shared (beit/run_class_finetuning.py).
        for name, count in stacks.items():
            result[name] = (shared,), partial(_copies, name=shared, count=count, resize=resize)
    elif source.grid != target.grid:
        if source.has_shared_bias:
            result[shared] = (shared,), lambda leaves: resize(leaves[shared])
        if source.has_layer_bias:
            for name in stacks:
                result[name] = (name,), partial(_each, name=name, resize=resize)
    if source.grid != target.grid and source.use_absolute_position_embeddings:
        name = parent + "embeddings/position_embeddings"
        result[name] = (name,), lambda leaves: _embeddings(leaves[name], source.grid, target.grid)
    kernel = partial(
        _patch_kernel, name=parent + "embeddings/patch_kernel", patch=target.patch_size, channels=target.num_channels
    )
    if source.num_channels != target.num_channels or channels_from is not None:
        kernel = partial(kernel, origin=channels_from, stored=stored)
    elif source.patch_size == target.patch_size:
        return result
    result[parent + "embeddings/patch_kernel"] = (parent + "embeddings/patch_kernel",), kernel
    return result


def _embeddings(embeddings: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    import jax.numpy as jnp

    from beit_jax.models.position import resize_position_embeddings

    return np.asarray(resize_position_embeddings(jnp.asarray(embeddings), source, target))


def _patch_kernel(
    leaves: Leaves,
    *,
    name: str,
    patch: tuple[int, int],
    channels: int,
    origin: tuple[int, ...] | None = None,
    stored: DTypeLike = np.float32,
) -> np.ndarray:
    kernel = leaves[name]
    if kernel.shape[2] != channels or origin is not None:
        kernel = channel_kernel(kernel, channels, origin, stored)
    return kernel if kernel.shape[:2] == patch else resize_patch_kernel(kernel, patch)


def _copies(leaves: Leaves, *, name: str, count: int, resize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.repeat(resize(leaves[name])[None], count, axis=0)


def _each(leaves: Leaves, *, name: str, resize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([resize(table) for table in leaves[name]])


def resize_table(table: np.ndarray, *, source: Grid, target: Grid, method: PositionResize) -> np.ndarray:
    """A bias table [m, heads] for another grid, at load time.

    The geometric method calls `RectBivariateSpline`, whose results are bit for bit those of the original code (which
    calls ``interp2d``, removed from SciPy). Inside a compiled program, `beit_jax.models.position.resize_bias_table`
    computes the same up to float32 rounding.
    """
    if method != "geometric" or source == target:
        import jax.numpy as jnp

        from beit_jax.models.position import resize_bias_table

        return np.asarray(resize_bias_table(jnp.asarray(table, jnp.float32), source, target, method)).astype(
            table.dtype
        )
    (rows, wanted_rows), (columns, wanted_columns) = (
        geometric_grid(2 * old - 1, 2 * new - 1) for old, new in zip(source, target, strict=True)
    )
    from scipy.interpolate import RectBivariateSpline  # takes half a second, and most programs do not need it

    patches = table[:-3].astype(np.float32).reshape(len(rows), len(columns), -1)
    resized = [
        RectBivariateSpline(columns, rows, head.T, kx=3, ky=3, s=0)(wanted_columns, wanted_rows).T
        for head in np.moveaxis(patches, -1, 0)
    ]
    return np.concatenate([np.stack(resized, axis=-1).reshape(-1, table.shape[1]), table[-3:]]).astype(table.dtype)


def resize_patch_kernel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A patch projection [height, width, c, d] for another patch size: a resized patch has the embedding of the patch.

    The kernel is multiplied by the pseudo-inverse of the (antialiased bicubic) resize of patches.

    Source: FlexiViT, arXiv:2212.08013, section 3.4; timm 1.0 `resample_patch_embed`.
    """
    rows, columns = (
        np.linalg.pinv(antialiased_bicubic_matrix(old, new).T) for old, new in zip(kernel.shape[:2], size, strict=True)
    )
    return np.einsum("ty,yxcd,sx->tscd", rows, kernel.astype(np.float64), columns).astype(kernel.dtype)


def channel_kernel(
    kernel: np.ndarray, channels: int, origin: tuple[int, ...] | None = None, stored: DTypeLike = np.float32
) -> np.ndarray:
    """A patch projection [height, width, c, d] for another number of channels, computed in float32.

    One channel: the sum over the old ones, by which a grey image has the embedding of the same image in grey colours.
    Otherwise the old channels are repeated in their order, cut to `channels`, and scaled by c / `channels`, which keeps
    the size of embeddings.

    Args:
        origin: for every new channel the old one, from 0, instead of that order; the scale is the same.
        stored: the type of the file, to which the result is rounded before it becomes that of `kernel` again.

    Source: timm 1.0 `adapt_input_conv`.
    """
    old, values = kernel.shape[2], kernel.astype(np.float32)
    if origin is None and channels == 1:
        found = values.sum(axis=2, keepdims=True)
    else:
        order = [channel % old for channel in range(channels)] if origin is None else list(origin)
        found = values[:, :, order] * np.float32(old / channels)
    return found.astype(stored).astype(kernel.dtype)
