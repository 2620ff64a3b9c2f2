"""Attention of TPUs by the kernels of `tpu_rows`: where they are computed, and on a mesh by which device.

The textbook form is decorated by `for_tpus(attend_by_rows)`. What counts is the device that a program is compiled for,
which a mesh names (`jax.set_mesh`). Without a mesh the textbook form is computed on a host of several devices: JAX may
then place arrays on some of them, which only the compiler learns, and no compiler divides a kernel.

Pallas takes 0.4 seconds to import, so it is imported only where kernels are traced.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from beit_jax.errors import environment_choice

from .mesh import AVERAGES, TPU_SWITCH, Split, Target, split_of

if TYPE_CHECKING:
    from .tpu_rows import Shape

_VMEM: Sequence[tuple[str, int]] = (
    # Of a core, MiB. Source: jax 0.12.0.1, jax/_src/pallas/mosaic/tpu_info.py.
    ("TPU v5 lite", 128),
    ("TPU v5e", 128),
    ("TPU v6", 128),
    ("TPU v5", 64),
    ("TPU7x", 64),
    ("", 16),
)

SWITCH = TPU_SWITCH
TPUS = Target("tpu", alone="tpu")
for_tpus, interpreted = TPUS.computes, TPUS.interpreted


def attend_by_rows(
    textbook: Callable[..., tuple[Array, Array | None]],
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "shards heads n n"] | None,
    drop: Callable[[Array], Array] | None = None,
    *,
    output_attentions: bool = False,
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n n"] | None]:
    """`attention.attend` by kernels, whose scores never leave a chip's own memory.

    The textbook form is computed instead where weights are dropped or returned, which takes them all at once; where a
    size is symbolic (`jax.export`); where the mesh does not divide the batch, or is of another mode than Auto; and
    where a head's rows and bias are too large for the memory of a core. And where the environment variable `SWITCH` is
    "xla".

    Gradients go backward only: there is no forward mode (`jax.jvp`), nor a second derivative.

    Raises:
        BeitJaxError: the environment variable says neither "rows" nor "xla".
    """
    suits = drop is None and not output_attentions and environment_choice(SWITCH, "rows", "xla") == "rows"
    divided = split_of(qkv, bias, interpret=TPUS.interpret) if suits else None
    if divided is None or not _fits(qkv, bias, divided):
        return textbook(qkv, bias, drop, output_attentions=output_attentions)
    if bias is not None and len(bias) < divided.shards:
        bias = jnp.broadcast_to(bias, (divided.shards, *bias.shape[1:]))
    averages = _rows(divided, qkv, bias)
    # Kept as the kernel wrote it, heads side by side: an axis of heads would be padded and moved.
    return checkpoint_name(averages.reshape(*averages.shape[:2], -1), AVERAGES).reshape(averages.shape), None


def _fits(qkv: Array, bias: Array | None, divided: Split) -> bool:
    """Whether the kernels fit into a core, with a tenth to spare for what the compiler adds."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device or TPUS.alone()
    kind = "" if device is None else str(device.device_kind)
    room = next(size for start, size in _VMEM if kind.startswith(start)) * 2**20
    batch, tokens, three, heads, width = qkv.shape
    local = (batch // divided.shards, tokens, three, heads // divided.parts, width)
    shards = 1 if bias is None else max(1, len(bias) // divided.shards)
    held = _shape(jax.ShapeDtypeStruct(local, qkv.dtype), shards, bias is not None).held
    return divided.interpret or held <= 0.9 * room


def _shape(qkv: Any, shards: int, biased: bool) -> "Shape":
    """Heads whose width neither divides the lanes well nor fills them are padded to as many lanes as they need."""
    from .tpu_rows import LANES, Shape

    batch, tokens, _, heads, width = qkv.shape
    together = width in (LANES // 2, LANES // 4) and heads % (LANES // width) == 0
    padded = width if together else width + -width % LANES
    return Shape(batch, tokens, heads, padded, width, qkv.dtype, shards, biased)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(
    divided: Split, qkv: Float[Array, "b n 3 heads e"], bias: Float[Array, "shards heads n n"] | None
) -> Float[Array, "b n heads e"]:
    """The averages of every token."""
    biases = [] if bias is None else [bias]
    return divided.over_devices(partial(_forward, divided.interpret), "qB"[: 1 + len(biases)], "a")(qkv, *biases)[0]


def _rows_forward(divided: Split, qkv: Array, bias: Array | None) -> tuple[Array, tuple[Array, Array | None]]:
    return _rows(divided, qkv, bias), (qkv, bias)


def _rows_backward(divided: Split, kept: tuple[Array, Array | None], upstream: Array) -> tuple[Array, Array | None]:
    qkv, bias = kept
    biases = [] if bias is None else [bias]
    function = partial(_backward, divided.interpret)
    kinds = "qaB"[: 2 + len(biases)], "qB"[: 1 + len(biases)]
    gradient, *sums = divided.over_devices(function, *kinds)(qkv, upstream, *biases)
    return gradient, sums[0].astype(bias.dtype) if bias is not None else None


_rows.defvjp(_rows_forward, _rows_backward)


def _forward(interpret: bool, qkv: Array, *biases: Array) -> tuple[Array]:
    from . import tpu_rows

    shape = _shape(qkv, len(biases[0]) if biases else 1, bool(biases))
    bias = biases[0] if biases else None
    averages = tpu_rows.forward(_side_by_side(qkv, shape), bias, shape, interpret=interpret)
    return (_heads(averages, shape),)


def _backward(interpret: bool, qkv: Array, upstream: Array, *biases: Array) -> tuple[Array, ...]:
    from . import tpu_rows

    shape = _shape(qkv, len(biases[0]) if biases else 1, bool(biases))
    bias = biases[0] if biases else None
    given = _side_by_side(qkv, shape), bias, _side_by_side(upstream, shape)
    gradient, sums = tpu_rows.backward(*given, shape, interpret=interpret)
    gradient = gradient.reshape(*qkv.shape[:4], shape.width)[..., : shape.scaled]
    return (gradient,) if sums is None else (gradient, sums)


def _side_by_side(x: Float[Array, "b n *more heads e"], shape: "Shape") -> Float[Array, "b n wide"]:
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, shape.width - shape.scaled)])
    return padded.reshape(*x.shape[:2], -1)


def _heads(x: Float[Array, "b n wide"], shape: "Shape") -> Float[Array, "b n heads e"]:
    return x.reshape(*x.shape[:2], shape.heads, shape.width)[..., : shape.scaled]
