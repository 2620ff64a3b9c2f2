"""BEiT v2's codebook as it learns: codes begin as clusters of features, then follow moving averages of those they get.

Features ("samples") and codes are directions, float32 vectors of length one; the code of a feature is a token. No
one-hot matrices: samples are added up by token, which under `jax.jit` sums over the whole batch, on however many
devices it lies.

Source: microsoft/unilm@768a3c8 beit2/norm_ema_quantizer.py, run there in half precision on GPUs. Its k-means runs on
every GPU by itself, whose codebooks then differ until averaging has brought them together; here there is one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from beit_jax.tokenizers.vqkd import l2_normalised

_EXACT = jax.lax.Precision.HIGHEST  # which cluster is nearest hangs on small differences


def kmeans(
    key: Key[Array, ""], samples: Float[Array, "n d"], clusters: int, iterations: int = 10
) -> tuple[Float[Array, "clusters d"], Float[Array, " clusters"]]:
    """Centres of clusters of directions, and how many samples each has, float32. All of it traceable.

    Starts from samples that are all different ones, or drawn with replacement where there are fewer than clusters.
    """
    count = len(samples)
    if count < clusters:
        chosen = jax.random.randint(key, (clusters,), 0, count)
    else:
        chosen = jax.random.permutation(key, count)[:clusters]
    return refined(samples[chosen], samples, iterations)


def refined(
    centres: Float[Array, "clusters d"], samples: Float[Array, "n d"], iterations: int
) -> tuple[Float[Array, "clusters d"], Float[Array, " clusters"]]:
    """Centres after some iterations of k-means by cosine similarity; a centre that has no samples stays.

    Returns:
        The centres, and the number of samples from which each was made in the last iteration.
    """

    def iterate(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        centres = state[0]
        nearest = jnp.einsum("nd,cd->nc", samples, centres, precision=_EXACT).argmax(axis=1)
        return mean_directions(centres, samples, nearest)

    return jax.lax.fori_loop(0, iterations, iterate, (centres, jnp.zeros(len(centres))))


def averaged(
    embedding: Float[Array, "codes d"], samples: Float[Array, "n d"], tokens: Int[Array, " n"], decay: float
) -> Float[Array, "codes d"]:
    """Codes one step on: each moves towards the mean direction of its samples, and all have length one again.

    A code without samples moves towards itself: it stays, up to the rounding of its length.
    """
    directions, _ = mean_directions(embedding, samples, tokens)
    return l2_normalised(decay * embedding + (1.0 - decay) * directions)


def mean_directions(
    embedding: Float[Array, "codes d"], samples: Float[Array, "n d"], tokens: Int[Array, " n"]
) -> tuple[Float[Array, "codes d"], Float[Array, " codes"]]:
    """The normalised mean of every token's samples, or its code where it has none; and how many it has."""
    sizes = counts(tokens, len(embedding))
    sums = jnp.zeros_like(embedding).at[tokens].add(samples)
    return jnp.where(sizes[:, None] > 0, l2_normalised(sums), embedding), sizes


def counts(tokens: Int[Array, "*b"], codes: int) -> Float[Array, " codes"]:
    """How often each token occurs, float32: exact up to 2**24."""
    return jnp.zeros(codes, jnp.int32).at[tokens].add(1).astype(jnp.float32)


def perplexity(sizes: Float[Array, " codes"]) -> Float[Array, ""]:
    """How many codes are in use, as it were: the exponential of the entropy of the tokens' frequencies; 1 of none."""
    return jnp.exp(jax.scipy.special.entr(sizes / jnp.maximum(sizes.sum(), 1.0)).sum())
