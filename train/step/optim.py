"""AdamW as BEiT uses it: clipping, decay of matrices only, and learning rates that grow with depth.

What depends on the parameter is a table over flat names. Blocks are stacked on a leading axis: a layer's learning rate
is an entry of a vector along it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from beit_jax.config import BeitConfig
from beit_jax.kernels.cpu import calls
from beit_jax.models.one_cpu import on_one_cpu
from beit_jax.tree import Nested, first_match, flatten, unflatten

from ..recipe import OptimOptions
from .division import EVERYTHING, Division
from .schedule import SPAN, correction_tables

Depth = Literal["first", "blocks", "last"]
Scalar = float | Float[Array, ""]
N = TypeVar("N")

# microsoft/unilm@768a3c8 beit/optim_factory.py, `get_num_layer_for_vit`: the shared bias table counts as last.
DEPTH: Sequence[tuple[str, Depth]] = (
    (r"(beit/)?embeddings/.*", "first"),
    (r"(beit/)?blocks/.*", "blocks"),
    (r".*", "last"),
)

# The same file, `get_parameter_groups`: no decay of vectors (per layer), of biases, of the class token and of absolute
# positions. Mask token and position bias tables are matrices like others there. So are an adapter's factors here.
DECAY: Sequence[tuple[str, bool]] = (
    (r".*(kernel|mask_token|bias_table|lora_a|lora_b)", True),
    (r".*(magnitude|bias|scale|gamma_1|gamma_2|cls_token|position_embeddings)", False),
)
BLOCK_TABLES = r"(beit/)?blocks/attention/bias_table"
CLASS_TOKEN = r"(beit/)?embeddings/cls_token"


@dataclass(frozen=True)
class Updates:
    """The updates of an `optax.GradientTransformation`, which one CPU need not compute.

    Attributes:
        of: what computes them.
        move: takes the arguments of `moved` but the first and gives its results, in one pass through memory.
    """

    of: Callable[..., tuple[Nested, Any]]
    move: Callable[..., tuple[Nested, Any]]

    def __call__(self, gradients: Nested, state: Any, params: Nested | None = None) -> tuple[Nested, Any]:
        """As optax calls an update."""
        return self.of(gradients, state, params)


def moved(
    tx: optax.GradientTransformation,
    gradients: Nested,
    state: Any,
    params: Nested,
    rate: Float[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[Nested, Any]:
    """Parameters and optimizer state after a step at this learning rate; the old ones, bit for bit, if not `finite`."""
    if isinstance(tx.update, Updates) and on_one_cpu():
        return tx.update.move(gradients, state, params, rate, finite)
    updates, new_state = tx.update(gradients, state, params)
    new = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
    return chosen(finite, (new, new_state), (params, state))


def chosen(condition: Bool[Array, ""], new: N, old: N) -> N:
    """`new` where the condition holds, `old` bit for bit where not."""
    return jax.tree.map(partial(jnp.where, condition), new, old)


def optimizer(
    options: OptimOptions, config: BeitConfig, division: Division = EVERYTHING
) -> optax.GradientTransformation:
    """AdamW without its learning rate: subtract its updates times the rate of the step, as `moved` does.

    Gradients are clipped by their global norm, then scaled by Adam; decay is added; both are multiplied by the layer's
    share of the learning rate. All as torch.optim.AdamW on the original's parameter groups.

    Args:
        division: says which blocks learn; by default all.
    """
    blocks = division.blocks(config.num_hidden_layers)

    def mask(params: Nested) -> Nested:
        return weight_decay_mask(params, bias_tables=options.decay_bias_tables, class_token=options.decay_class_token)

    def scales(params: Nested) -> Nested:
        return layer_scales(params, config, options.layer_decay, blocks)

    def scale(updates: Nested, params: Nested | None) -> Nested:
        return jax.tree.map(jnp.multiply, updates, scales(updates))

    chain = optax.chain(
        optax.identity() if options.clip is None else clip_by_global_norm(options.clip),
        adam(options.beta1, options.beta2, options.epsilon),
        optax.add_decayed_weights(options.weight_decay, mask),
        optax.stateless(scale),
    )

    def move(gradients: Nested, state: Any, params: Nested, rate: Float[Array, ""], finite: Bool[Array, ""]) -> Any:
        clipping, moments, *others = state  # in the order of the chain
        share = jnp.ones(()) if options.clip is None else clipped_share(gradients, options.clip)
        count = optax.safe_increment(moments.count)
        first, second = corrections(options.beta1, options.beta2, count)
        numbers = jnp.stack([share, first, second, finite.astype(jnp.float32)])

        def leaf(parameter: Array, mean: Array, square: Array, gradient: Array, scale: np.ndarray, decays: bool) -> Any:
            return calls.adamw(
                parameter, mean, square, gradient, rate * scale, numbers,
                beta1=options.beta1, beta2=options.beta2, epsilon=options.epsilon,
                decay=options.weight_decay if decays else 0.0,
            )  # fmt: skip

        found = jax.tree.map(leaf, params, moments.mu, moments.nu, gradients, scales(params), mask(params))
        new, mean, square = jax.tree.transpose(jax.tree.structure(params), None, found)
        count = jnp.where(finite, count, moments.count)
        return new, (clipping, optax.ScaleByAdamState(count, mean, square), *others)

    return chain._replace(update=Updates(chain.update, move))


def adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) with the arithmetic of torch.optim.AdamW, and the state of `optax.scale_by_adam`.

    The moments are corrected by numbers that were computed in float64 (`schedule.correction_tables`), as in torch;
    optax computes them in float32, which shows in the first steps.
    """

    def init(params: Nested) -> optax.ScaleByAdamState:
        state: optax.ScaleByAdamState = optax.scale_by_adam(mu_dtype=jnp.float32).init(params)
        return state

    def update(
        gradients: Nested, state: optax.ScaleByAdamState, params: Nested | None = None
    ) -> tuple[Nested, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(gradients, state.mu, beta1, 1)
        square = optax.tree.update_moment(gradients, state.nu, beta2, 2)
        first, second = corrections(beta1, beta2, count)
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v) / second + epsilon), mean, square)
        return updates, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def corrections(beta1: float, beta2: float, count: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What the mean is divided by after so many steps, and what the root of the mean square is."""

    def correction(beta: float) -> Float[Array, ""]:
        low, high = (jnp.asarray(table) for table in correction_tables(beta))
        done = high[jnp.minimum(count // SPAN, len(high) - 1)]
        return done + (1.0 - done) * low[count % SPAN]

    return correction(beta1), jnp.sqrt(correction(beta2))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Shrinks gradients whose global norm exceeds `largest`, as ``torch.nn.utils.clip_grad_norm_``.

    torch divides by the norm plus 1e-6, optax's transformation of this name by the norm.
    """

    def clip(updates: Nested, params: Nested | None) -> Nested:
        share = clipped_share(updates, largest)
        return jax.tree.map(lambda update: update * share, updates)

    return optax.stateless(clip)


def clipped_share(gradients: Nested, largest: float) -> Float[Array, ""]:
    """What gradients are multiplied by so that their global norm is not above `largest`."""
    return jnp.minimum(largest / (global_norm(gradients) + 1e-6), 1.0)


def global_norm(gradients: Nested) -> Float[Array, ""]:
    """The norm of all gradients as one vector.

    On one CPU, XLA would write their squares to memory, because Adam reads squares too: the barrier keeps them apart.
    """
    found: Float[Array, ""] = optax.tree.norm(jax.lax.optimization_barrier(gradients) if on_one_cpu() else gradients)
    return found


def weight_decay_mask(params: Nested, *, bias_tables: bool = True, class_token: bool = False) -> Nested:
    """True for every parameter that decays.

    Args:
        bias_tables: whether the blocks' tables of relative position bias do; the shared one always does.
        class_token: whether the class token does. In the original's segmentation it does: its list of exceptions has
            "cls_token", the parameter is called "backbone.cls_token" there.

    Raises:
        BeitJaxError: a parameter of a name that the table does not know.
    """
    exceptions = [(BLOCK_TABLES, bias_tables), *([(CLASS_TOKEN, True)] if class_token else [])]
    rules = [*exceptions, *DECAY]
    return unflatten({name: first_match(rules, name) for name in flatten(params)})


def layer_scales(params: Nested, config: BeitConfig, rate: float, blocks: Sequence[int] | None = None) -> Nested:
    """Each parameter's share of the learning rate, float32 and broadcastable to it. Takes arrays or shapes.

    Embeddings are layer 0, block i is layer i + 1, what follows the blocks is layer depth + 1: of share 1. Every layer
    has `rate` times the share of the next.

    Args:
        blocks: numbers of the blocks, from 0, that the rows of stacked leaves are; by default all.
    """
    depth = config.num_hidden_layers
    rows = np.arange(depth) if blocks is None else np.asarray(blocks)
    shares = rate ** np.arange(depth + 1, -1, -1.0)

    def share(depth_of: Depth, ndim: int) -> np.ndarray:
        if depth_of == "blocks":
            return shares[1:-1][rows].astype(np.float32).reshape(len(rows), *[1] * (ndim - 1))
        return np.asarray(shares[0 if depth_of == "first" else -1], np.float32)

    return unflatten({name: share(first_match(DEPTH, name), leaf.ndim) for name, leaf in flatten(params).items()})


def ema_update(ema: Nested, params: Nested, decay: Scalar, gain: Scalar) -> Nested:
    """The moving average one step on: ``decay * ema + gain * params``.

    Args:
        gain: 1 - decay, from whoever has it in more digits than float32's.
    """
    return jax.tree.map(lambda average, leaf: average * decay + leaf * gain, ema, params)
