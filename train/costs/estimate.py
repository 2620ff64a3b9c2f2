"""Estimates of the FLOPs of a training step and of the memory of a device, and the peak FLOP/s of devices."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from beit_jax.config import BeitConfig
from beit_jax.models.build import abstract_model, param_shapes, statistics
from beit_jax.models.interface import Remat
from beit_jax.models.one_cpu import traced_for
from beit_jax.tree import Nested, first_match

# --- FLOPs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating point operations of the matrix products of a model, forward, for one image; a multiply-add is two.

    Attributes:
        patches: the patch projection.
        dense: in all blocks, the products with parameters.
        attention: in all blocks, scores and weighted values; quadratic in the number of tokens.
        head: everything after the encoder.
    """

    patches: float
    dense: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        return self.patches + self.dense + self.attention + self.head

    def training(self, remat: Remat = "none") -> float:
        """FLOPs of forward and backward pass. Each product has two gradients; that of the pixels is not computed.

        Model FLOP utilisation counts what the model needs, so it uses "none" whatever the run recomputes.
        """
        again = {"none": 0.0, "block": self.dense + self.attention, "dots": self.attention}
        return 3 * self.forward - self.patches + again[remat]


def flops(config: BeitConfig) -> Flops:
    """FLOPs of a model at its native image size, including its aggregation layers.

    Norms, softmax and activations, a few percent, are not counted.
    """
    tokens = 1 + config.grid[0] * config.grid[1]
    positions = _positions(config)
    totals = {"patches": 0.0, "dense": 0.0, "head": 0.0}
    for name, shape in param_shapes(config).items():
        if name.endswith("kernel"):
            part, count = first_match(positions, name)
            totals[part] += 2.0 * prod(shape) * count
    blocks = config.num_hidden_layers + config.aggregation_layers
    return Flops(attention=4.0 * blocks * tokens**2 * config.hidden_size, **totals)


def traced_flops(loss: Callable[[int, Nested], Array], params: Nested) -> float:
    """FLOPs of the gradient of a loss for one image: those traced for three images minus those for two.

    Args:
        loss: the loss of a number of images, with parameters.
        params: shapes of the parameters.
    """

    def of(images: int) -> float:
        with _as_here():
            return _matrix_flops(jax.make_jaxpr(jax.grad(partial(loss, images)))(params).jaxpr)

    return of(3) - of(2)


def _as_here() -> AbstractContextManager[None]:
    """Traces count for the devices of this machine: no program follows that could choose."""
    return traced_for(jax.default_backend())


def _matrix_flops(jaxpr: Any) -> float:
    """FLOPs of all products of matrices and convolutions in a traced program."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * prod(equation.outvars[0].aval.shape) * prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * prod(equation.outvars[0].aval.shape) * prod(kernel) / outputs
        elif name == "cond":
            total += max(_matrix_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            inner = [value for value in parameters.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
            times = parameters.get("length", 1) if name == "scan" else 1
            total += times * sum(_matrix_flops(getattr(value, "jaxpr", value)) for value in inner)
    return total


def _positions(config: BeitConfig) -> list[tuple[str, tuple[str, int]]]:
    """For every kernel, by its flat name: the part it belongs to, and the positions of an image at which it is used."""
    rows, columns = config.grid
    patches = rows * columns
    predictions = 2 if config.aggregation_layers and not config.own_aggregation_head else 1
    levels = {"0": 16 * patches, "1": 4 * patches, "2": patches}  # of the feature pyramid, finest first
    coarsest = (rows // 2) * (columns // 2)
    return [
        (r"(beit/)?embeddings/patch_kernel", ("patches", patches)),
        (r"(beit/|aggregation/)?blocks/.*", ("dense", 1 + patches)),
        (r"classifier/.*", ("head", 1)),
        (r"aggregation/lm_head/.*", ("head", patches)),
        (r"lm_head/.*", ("head", patches * predictions)),
        (r"fpn/(up4_first|up2)/.*", ("head", patches)),
        (r"fpn/up4_second/.*", ("head", levels["1"])),
        *((rf"decode_head/(lateral|smooth)_{level}/.*", ("head", count)) for level, count in levels.items()),
        *((rf"decode_head/pool_{i}/.*", ("head", scale**2)) for i, scale in enumerate(config.pool_scales)),
        (r"decode_head/bottleneck/.*", ("head", coarsest)),
        (r"decode_head/(fuse|classifier)/.*", ("head", levels["0"])),
        (r"auxiliary_head/.*", ("head", patches)),
    ]


# --- Memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on each device.

    Attributes:
        params, optimizer, gradients: of the learned parameters, float32; the optimizer holds Adam's two moments.
        average: the moving average or a frozen network, where the state has one.
        activations: values that the forward pass keeps for the backward pass, and those of one recomputed block.
    """

    params: int
    optimizer: int
    average: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return self.params + self.optimizer + self.average + self.gradients + self.activations

    def lines(self) -> list[str]:
        """The parts and their sum in GiB, as lines for people."""
        parts = {name: getattr(self, name) for name in ("params", "optimizer", "average", "gradients", "activations")}
        return [f"{name:<12}{size / 2**30:8.2f} GiB" for name, size in (parts | {"total": self.total}).items() if size]


def memory(learned: int, activations: int, *, others: int = 0, accumulate: int = 1, shards: int = 1) -> Memory:
    """Estimates the memory of each device.

    Memory that the compiler adds, such as copies of parameters in another dtype, is not included. `compiled_bytes` of
    the compiled step includes it.

    Args:
        learned: bytes of the parameters that gradients move.
        activations: bytes of one part of the batch, on one device.
        others: bytes of the other networks in the state: the average of the parameters, a frozen network.
        accumulate: parts of a batch; gradients are held twice if there are several.
        shards: devices that share one copy of parameters, optimizer and average: fsdp times tensor.
    """
    numbers = -(-learned // shards)
    return Memory(
        params=numbers,
        optimizer=2 * numbers,
        average=-(-others // shards),
        gradients=numbers * (2 if accumulate > 1 else 1),
        activations=activations,
    )


def activation_bytes(
    config: BeitConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    residual: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> int:
    """Bytes per image that a training step keeps for the backward pass, and those of one block that is recomputed.

    The model is traced; nothing is compiled.
    """
    kept = _residual_bytes(config, dtype, residual, remat)
    if remat == "none":
        return kept
    return with_one_block(kept, _residual_bytes(config, dtype, residual, "none"), config.num_hidden_layers)


def with_one_block(kept: int, whole: int, blocks: int) -> int:
    """Bytes that are kept if blocks are recomputed, plus those of the one block that is recomputed at a time.

    Args:
        kept: bytes that are kept if blocks are recomputed.
        whole: bytes that are kept if nothing is recomputed.
        blocks: the number of blocks.
    """
    return kept + (whole - kept) // blocks


def traced_activations(loss: Callable[[int, Nested], Array], params: Nested) -> int:
    """Bytes for one image that the gradient of a loss keeps; arguments as for `traced_flops`."""

    def of(images: int) -> int:
        with _as_here():
            return tree_bytes(jax.eval_shape(lambda params: jax.vjp(partial(loss, images), params)[1], params))

    return of(3) - of(2)


def _residual_bytes(config: BeitConfig, dtype: DTypeLike, residual: DTypeLike, remat: Remat) -> int:
    """Bytes that differentiation stores for one more image: those for three images minus those for two."""
    three, two = (_stored(config, dtype, residual, remat, images) for images in (3, 2))
    return three - two


def _stored(config: BeitConfig, dtype: DTypeLike, residual: DTypeLike, remat: Remat, images: int) -> int:
    graph, shapes = abstract_model(config, dtype=dtype, residual=residual)
    options: dict[str, Any] = {"train": True} if statistics(config) else {}

    def backward(params: Nested) -> Any:
        pixel_values = jnp.zeros((images, *config.image_size, config.num_channels))
        options["key"] = jax.random.key(0)
        return jax.vjp(lambda params: nnx.merge(graph, params)(pixel_values, remat=remat, **options), params)[1]

    with _as_here():
        return tree_bytes(jax.eval_shape(backward, shapes))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a compiled program takes on each device: arguments, results, temporaries; donated arguments once.

    Returns:
        None where the backend does not say.
    """
    found: Any = compiled.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(held + found.temp_size_in_bytes)


# --- Devices ----------------------------------------------------------------------------------------------------------

_PEAKS: list[tuple[str, float | None]] = [
    # https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x: "Peak compute per chip (bf16)". A JAX device is a
    # chip, or half a TPU7x.
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x", 2307e12 / 2),
    # NVIDIA's data sheets: "BFLOAT16 Tensor Core" with sums in float32, halved where the sheet counts sparsity.
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H[12]00 NVL", 835.5e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H[12]00.*", 989.5e12),
    (r"NVIDIA B[23]00", 2250e12),
    (r"NVIDIA GB[23]00", 2500e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA RTX A6000", 154.8e12),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2e12),
    (r"NVIDIA RTX PRO 6000 Blackwell.*", 503.8e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    (r"NVIDIA GeForce RTX 5090", 209.5e12),
    (r".*", None),
]


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of dense bfloat16 matrix products that the manufacturer states for a `jax.Device.device_kind`.

    Returns:
        None for a kind that is not in the table, such as a CPU: no utilisation is better than a wrong one.
    """
    return first_match(_PEAKS, device_kind)
