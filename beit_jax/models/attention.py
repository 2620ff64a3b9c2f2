"""Every token attends to every token, with a bias on the scores that is the same for all samples."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from beit_jax.models.partition import on_one_cpu

Drop = Callable[[Array], Array]
CACHE = 16 * 2**20  # bytes of scores up to which a CPU computes them at once: about what its caches hold


def attend(
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "shards heads n n"] | None,
    drop: Drop | None = None,
    *,
    output_attentions: bool = False,
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n n"] | None]:
    """The values, averaged with weights ``softmax(query @ key / sqrt(e) + bias)``.

    Scores and their exponentials are float32; products read the dtype of `qkv` and accumulate in float32.

    Args:
        bias: what positions add to the scores; once for every shard of the batch (`partition.each_shard`).
        drop: dropout of the weights.
        output_attentions: whether to return the weights too.

    Returns:
        The averages, in the dtype of `qkv`; and, on request, the weights, float32, after their dropout.
    """
    batch, tokens, _, heads, _ = qkv.shape
    if drop is not None or output_attentions or not on_one_cpu():
        return _attend(qkv, bias, drop, output_attentions)
    # What all samples' scores take is written and read several times. In pieces, they stay in a CPU's cache.
    scores = 4 * heads * tokens**2
    if batch * scores <= CACHE:
        return _attend(qkv, bias)
    if scores <= CACHE:
        return jax.lax.map(lambda one: _attend(one[None], bias)[0][0], qkv), None
    biases = jnp.zeros((heads, 1, 1)) if bias is None else bias[0]

    def sample(qkv: Float[Array, "n 3 heads e"]) -> Float[Array, "n heads e"]:
        def head(piece: tuple[Array, Array]) -> Array:
            return _attend(piece[0][None, :, :, None], piece[1][None, None])[0][0, :, 0]

        return jnp.moveaxis(jax.lax.map(head, (jnp.moveaxis(qkv, 2, 0), biases)), 0, 1)

    return jax.lax.map(sample, qkv), None


def _attend(
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "shards heads n n"] | None,
    drop: Drop | None = None,
    output_attentions: bool = False,
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n n"] | None]:
    stacked = jnp.einsum("bnkhe->kbhne", qkv)
    # A split's gradient joins three pieces, an index's adds them up; TPUs fuse the sum and are faster with it.
    query, key, value = (piece[0] for piece in jnp.split(stacked, 3)) if on_one_cpu() else stacked
    scores = jnp.einsum("bhqe,bhke->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + _of_all_samples(bias, len(scores))
    # The sums divide the averages, not the weights, of which there are many more.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights if drop is None else drop(weights)
    averages = jnp.einsum("bhqk,bhke->bhqe", weights.astype(qkv.dtype), value, preferred_element_type=jnp.float32)
    averages = jnp.moveaxis((averages / total).astype(qkv.dtype), 1, 2)
    return averages, weights / total if output_attentions else None


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _of_all_samples(bias: Float[Array, "shards heads n n"], batch: int) -> Float[Array, "b heads n n"]:
    """The bias of each sample, which is that of its shard."""
    repeated = jnp.broadcast_to(bias[:, None], (len(bias), batch // len(bias), *bias.shape[1:]))
    return repeated.reshape(batch, *bias.shape[1:])


@_of_all_samples.defjvp
def _derivative(batch: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The same of the tangent, as it is linear; its transpose sums over samples."""
    (bias,), (tangent,) = primals, tangents
    if len(bias) == 1 and on_one_cpu():  # a loop sums thirty times as fast as XLA does over a CPU's outer axis
        change = jax.lax.map(lambda _: tangent[0], jnp.arange(batch))
    else:
        change = _of_all_samples(tangent, batch)
    return _of_all_samples(bias, batch), change
