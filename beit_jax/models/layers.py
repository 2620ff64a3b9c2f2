"""One transformer block of BEiT: attention with relative position bias, MLP, layer scale, stochastic depth.

BEiT-3's block has two norms more ("sub-LayerNorm", arXiv:2210.06423): before the last product of each branch.

Precision. Parameters are float32 (or bfloat16, read as float32). `dtype` (float32 or bfloat16) is what matrix products
read; they accumulate in float32. LayerNorm, softmax and layer scale are float32 always. So is the residual stream, but
for training that asks for another: then sums are rounded to it.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from beit_jax.adapters.kernel import casting
from beit_jax.config import BeitConfig
from beit_jax.kernels.cpu.calls import PositionBias
from beit_jax.kernels.elements import for_accelerators, kept, with_scaled_kernels
from beit_jax.models.attention import attend
from beit_jax.models.elementary import bias_of, dense, dropout, drops, expand, layer_norm, project
from beit_jax.models.position import Grid, attention_bias, num_relative_offsets


class Attention(nnx.Module):
    """Multi-head self-attention. Query and value have a bias; positions add to the scaled scores.

    A bias of the keys adds one number to all scores of a query, which changes no weight; ViT and BEiT-3 have it still.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        normal = nnx.initializers.normal(config.initializer_range)
        self.qkv_kernel = nnx.Param(normal(rngs.params(), (hidden, 3, heads, head_dim)))
        if config.use_key_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((3, heads, head_dim)))
        else:
            self.q_bias = nnx.Param(jnp.zeros((heads, head_dim)))
            self.v_bias = nnx.Param(jnp.zeros((heads, head_dim)))
        self.out_kernel = nnx.Param(normal(rngs.params(), (heads, head_dim, hidden)))
        self.out_bias = nnx.Param(jnp.zeros((hidden,)))
        if config.has_layer_bias:
            self.bias_table = nnx.Param(jnp.zeros((num_relative_offsets(config.grid), heads)))
        if config.use_sub_norm:
            self.norm = layer_norm(config, rngs)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        x: Float[Array, "b n d"],
        grid: Grid,
        shared_bias: PositionBias | None,
        key: Key[Array, ""] | None,
        *,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b heads n n"] | None]:
        """The attended values; on request, the probabilities (float32, after their dropout as in the reference)."""
        cast, rate = casting(self.dtype), self.config.attention_probs_dropout_prob
        if self.config.use_key_bias:
            qkv_bias = self.qkv_bias[...]
        else:
            qkv_bias = jnp.stack([self.q_bias[...], jnp.zeros_like(self.q_bias[...]), self.v_bias[...]])
        qkv = project(cast(x), cast(self.qkv_kernel[...]), cast(qkv_bias))
        biases = [bias for bias in (self.layer_bias(grid, x.shape[0]), shared_bias) if bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        drop = (lambda weights: dropout(weights, rate, key)) if drops(rate, key) else None
        attended, probabilities = attend(qkv, bias, drop, output_attentions=output_attentions)
        if self.config.use_sub_norm:
            attended = cast(self.norm(attended.reshape(x.shape)).reshape(attended.shape))
        return project(attended, cast(self.out_kernel[...]), self.out_bias[...].astype(jnp.float32)), probabilities

    def layer_bias(self, grid: Grid, batch: int) -> PositionBias | None:
        """This layer's own position bias at the given patch grid; None if the model has none per layer."""
        if not self.config.has_layer_bias:
            return None
        return attention_bias(self.bias_table[...], self.config.grid, grid, self.config.position_resize, batch)


class Mlp(nnx.Module):
    """Two dense layers with the activation between, and BEiT-3's norm after it."""

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = dense(config, config.hidden_size, config.intermediate_size, dtype, rngs)
        self.fc2 = dense(config, config.intermediate_size, config.hidden_size, dtype, rngs, jnp.float32)
        if config.use_sub_norm:
            self.norm = layer_norm(config, rngs, config.intermediate_size)
        self.config, self.dtype = config, dtype

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        cast = casting(self.dtype)
        hidden = expand(cast(x), cast(self.fc1.kernel[...]), cast(bias_of(self.fc1)), self.config.hidden_act)
        hidden = cast(self.norm(hidden)) if self.config.use_sub_norm else hidden
        # The bias is read in `dtype`, and added in float32.
        return project(hidden, cast(self.fc2.kernel[...]), cast(bias_of(self.fc2)).astype(jnp.float32))


class Block(nnx.Module):
    """Pre-norm residual block: ``x += drop(gamma_1 * attention(norm1 x)); x += drop(gamma_2 * mlp(norm2 x))``.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py, `Block`; transformers 5.23 `BeitLayer`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.norm1 = layer_norm(config, rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(config, rngs)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)
        if config.layer_scale_init_value > 0:
            self.gamma_1 = nnx.Param(jnp.full((config.hidden_size,), config.layer_scale_init_value))
            self.gamma_2 = nnx.Param(jnp.full((config.hidden_size,), config.layer_scale_init_value))
        self.config = config

    @for_accelerators(with_scaled_kernels)
    def __call__(
        self,
        x: Float[Array, "b n d"],
        grid: Grid,
        shared_bias: PositionBias | None = None,
        drop_path_rate: Float[Array, ""] | float | None = None,
        key: Key[Array, ""] | None = None,
        *,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b heads n n"] | None]:
        """The new residual stream; on request, attention probabilities. Without `key` nothing is dropped."""
        keys = [None] * 5 if key is None else jax.random.split(key, 5)

        def branch(out: Array, gamma: str, drop_key: Array | None, path_key: Array | None) -> Array:
            out = dropout(out, self.config.hidden_dropout_prob, drop_key)
            scaled = getattr(self, gamma)[...] * out if self.config.layer_scale_init_value > 0 else out
            return dropout(scaled, drop_path_rate, path_key, per_sample=True)

        attended, probabilities = self.attention(
            self.norm1(x), grid, shared_bias, keys[0], output_attentions=output_attentions
        )
        x = kept((x + branch(attended, "gamma_1", keys[1], keys[2])).astype(x.dtype))
        x = (x + branch(self.mlp(self.norm2(x)), "gamma_2", keys[3], keys[4])).astype(x.dtype)
        return x, probabilities


def stacked_blocks(config: BeitConfig, count: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
    """So many blocks as one: every leaf has a leading axis of this length, as `jax.lax.scan` takes it."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key)))(keys)
