"""The interface that all models share.

Input: shapes of images and masks. Output: `BeitOutput`, and hidden states on request. Description: a model without
arrays, what gradients compute again, and which blocks have none.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from beit_jax.config import BeitConfig, Task
from beit_jax.errors import BeitJaxError, size_near
from beit_jax.kernels.cpu import calls
from beit_jax.kernels.mesh import AVERAGES, KEPT
from beit_jax.models.one_cpu import scan_blocks, unrolls
from beit_jax.models.position import Grid
from beit_jax.tree import Nested

ArrayLike = Array | np.ndarray
Remat = Literal["none", "block", "dots"]
M = TypeVar("M", bound=nnx.Module)


def _any_of(*policies: Callable[..., Any]) -> Callable[..., Any]:
    """The policy of `jax.checkpoint` that keeps what one of these keeps."""
    return reduce(jax.checkpoint_policies.save_from_both_policies, policies)


REMAT: Mapping[Remat, Callable[[Any], Any]] = {
    "none": lambda step: step,
    "block": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=_any_of(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(AVERAGES, KEPT),
            calls.is_kernel,
        ),
    ),
}
"""The rematerialisation of a scanned block: each value wraps the step of the scan.

"block" computes the whole block again on the way back. "dots" keeps the products with parameters, and computes the rest
again: attention scores too, which are quadratic in the tokens. Of attention by a kernel (`beit_jax.kernels`), which
has no scores to keep, it keeps the averages too: the kernel runs once. The forward and the backward pass are two loops,
so the compiler cannot merge the second computation with the first, and `jax.checkpoint` need not prevent it.

A loop that is written out (`beit_jax.models.one_cpu.unrolls`) has no rematerialisation: the compiler would merge them.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeitOutput:
    """The output of a model. Fields that transformers has too mean the same there.

    Attributes:
        last_hidden_state: [b, 1 + patches, d]; normalised if and only if the model pools the class token.
        pooler_output: [b, d], or None for a model without pooling; with an embedding that, [b, embedding_size].
        logits: the head's output, or None for a model without a head.
        hidden_states: on request, [depth + 1, b, 1 + patches, d]: the embeddings, then after each block, un-normalised.
        attentions: on request, [depth, b, heads, n, n] float32 probabilities.
        taps: on request, chosen hidden states [taps, b, 1 + patches, d].
        aggregated_logits: on request, the logits of the same head on the output of BEiT v2's aggregation layers.
    """

    last_hidden_state: Float[Array, "b n d"]
    pooler_output: Float[Array, "b pooled"] | None = None
    logits: Float[Array, "b *classes"] | None = None
    hidden_states: Float[Array, "layers b n d"] | None = None
    attentions: Float[Array, "depth b heads n n"] | None = None
    taps: Float[Array, "taps b n d"] | None = None
    aggregated_logits: Float[Array, "b k classes"] | None = None


def abstract_module(make: Callable[[], M]) -> tuple[nnx.GraphDef[M], Nested]:
    """A Flax module without arrays.

    Args:
        make: makes the module. It is traced, so no parameter is drawn and no memory is taken.

    Returns:
        The graph that `nnx.merge` needs beside the parameters; and, nested, the shape and dtype of every parameter and
        of every running statistic.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(state)


def check_task(config: BeitConfig, task: Task) -> None:
    """Refuses the configuration of another model than the one that is built of it.

    Raises:
        BeitJaxError: names both tasks.
    """
    if config.task != task:
        raise BeitJaxError(
            f"task: expected {task} for this class, found {config.task}; take the class of the task, "
            f"beit_jax.models.build.MODELS[config.task], or dataclasses.replace(config, task={task!r})"
        )


def patch_grid(config: BeitConfig, pixel_shape: tuple[int, ...]) -> Grid:
    """(rows, columns) of patches in pixel_values of this shape.

    Raises:
        BeitJaxError: not [batch, height, width, channels], other channels than the model's, or sides that the patch
            does not divide.
    """
    if len(pixel_shape) != 4 or pixel_shape[-1] != config.num_channels:
        raise BeitJaxError(
            f"pixel_values: expected [batch, height, width, {config.num_channels}], found {list(pixel_shape)}"
        )
    sides = pixel_shape[1:3]
    if any(side % patch or not side for side, patch in zip(sides, config.patch_size, strict=True)):
        raise BeitJaxError(
            f"pixel_values: height and width {sides} are not multiples of the patch {config.patch_size}, "
            f"as {size_near(sides, config.patch_size)} would be"
        )
    return sides[0] // config.patch_size[0], sides[1] // config.patch_size[1]


def checked_mask(config: BeitConfig, mask: ArrayLike, shape: tuple[int, ...]) -> Array:
    """`bool_masked_pos` as a boolean array [batch, patches].

    Raises:
        BeitJaxError: the model has no mask token, or the mask has not this shape (batch, patches).
    """
    if not config.use_mask_token:
        raise BeitJaxError("bool_masked_pos was given, but this model has no mask token (use_mask_token is false)")
    if mask.shape != shape:
        raise BeitJaxError(f"bool_masked_pos: expected shape {shape} (batch, patches), found {mask.shape}")
    return jnp.asarray(mask, bool)


def drop_path_rates(config: BeitConfig, depth: int, blocks: range | None = None) -> Float[Array, "blocks"] | None:
    """The rates of stochastic depth of these blocks, by default of all: from 0 for the first of `depth` up to the
    configuration's for the last. None if that is 0."""
    if not config.drop_path_rate:
        return None
    rates = jnp.linspace(0.0, config.drop_path_rate, depth)
    return rates if blocks is None else rates[blocks.start : blocks.stop]


# --- Taps: hidden states on request, without a buffer for every layer -------------------------------------------------


def tap_slots(taps: tuple[int, ...], depth: int) -> Array | None:
    """The place of each block's output in a buffer of the tapped states, [depth] int32; None without taps.

    Every block writes to the place of the next tap, so the next block overwrites a state that is not tapped. Blocks
    after the last tap write to one more place. So the scan carries as many states as there are taps, and one.

    Raises:
        BeitJaxError: the taps are not growing indices of hidden states.
    """
    if not taps:
        return None
    if list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] <= depth:
        raise BeitJaxError(f"taps: expected growing indices of the {depth + 1} hidden states, found {list(taps)}")
    return jnp.asarray(np.searchsorted(np.asarray(taps), np.arange(1, depth + 1)), jnp.int32)


def tap_buffer(taps: tuple[int, ...], embedded: Float[Array, "b n d"]) -> Float[Array, "places b n d"] | None:
    """The buffer before the first block, which holds the embeddings (hidden state 0) everywhere; None without taps."""
    return jnp.broadcast_to(embedded, (len(taps) + 1, *embedded.shape)) if taps else None


def write_tap(
    buffer: Float[Array, "places b n d"] | None, state: Float[Array, "b n d"], slot: Int[Array, ""] | None
) -> Float[Array, "places b n d"] | None:
    """The buffer after a block wrote its output to its place."""
    return None if buffer is None else jax.lax.dynamic_update_index_in_dim(buffer, state, slot, 0)


def read_taps(taps: tuple[int, ...], buffer: Float[Array, "places b n d"] | None) -> Float[Array, "taps b n d"] | None:
    """The tapped states after the last block; None without taps."""
    return None if buffer is None else buffer[: len(taps)].astype(jnp.float32)


def scan(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    layers: tuple[Any, ...],
    shared: Any = None,
    *,
    fixed: Collection[int] = (),
    remat: Remat = "none",
    scores: bool = True,
) -> tuple[Any, Any]:
    """`jax.lax.scan` over stacked blocks, and what belongs to each, without gradients of some blocks' parameters.

    A loop computes gradients of all of its parameters or of none. So neighbours that are fixed are one loop, neighbours
    that are not another: for a fixed block no gradient of a parameter is computed, and if nothing before it learns,
    nothing is kept for the backward pass either.

    Args:
        step: takes the carry, a layer, and `shared`.
        carry: what the first block reads, before all else.
        layers: the blocks first; every leaf has an axis of length depth in front.
        shared: what all blocks read.
        fixed: numbers of the blocks, from 0, without gradients.
        remat: what gradients compute again on the way back, see `REMAT`.
        scores: whether attention has scores, as it has without the kernels of one CPU; False where they may compute it.
    """
    unrolled = unrolls(jax.tree.leaves(carry)[0], remat, scores=scores)
    step = step if unrolled else REMAT[remat](step)
    if not fixed:
        return scan_blocks(step, carry, layers, shared, unrolled=unrolled)
    leaves, structure = jax.tree.flatten(layers)
    loops, outputs = runs(len(leaves[0]), fixed), []
    # The way back of `split` is a concatenation; that of slices would be a sum of arrays as long as all blocks.
    parts = zip(*(jax.lax.split(leaf, [len(numbers) for numbers, _ in loops]) for leaf in leaves), strict=True)
    for part, (_, is_fixed) in zip(parts, loops, strict=True):
        blocks, *others = jax.tree.unflatten(structure, part)
        own = (jax.lax.stop_gradient(blocks) if is_fixed else blocks, *others)
        carry, output = scan_blocks(step, carry, own, shared, unrolled=unrolled)
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def runs(depth: int, fixed: Collection[int]) -> list[tuple[range, bool]]:
    """The numbers of so many blocks in runs of neighbours that are all fixed, or all not."""
    found = []
    for is_fixed, group in groupby(range(depth), lambda number: number in fixed):
        numbers = list(group)
        found.append((range(numbers[0], numbers[-1] + 1), is_fixed))
    return found
