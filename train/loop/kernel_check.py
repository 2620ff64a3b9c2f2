"""Before the first step: whether the kernels of attention compute on this device what the textbook form does.

Compilers and drivers differ between machines, and kernels are the one part of a program that nothing else compares. So
every process compares its first device once, which takes less than a second after compilation.
"""

from functools import partial
from inspect import unwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from beit_jax.errors import BeitJaxError, printable
from beit_jax.kernels import gpu, tpu
from beit_jax.models.attention import attend

from ..distributed.sharding import make_mesh
from .program import Program

TOLERANCE = 0.05
"""Of the norm of each result. Both forms round to bfloat16 in between, by about 0.01; a wrong kernel is wrong by 1."""
SWITCHES = {"tpu": tpu.SWITCH, "gpu": gpu.SWITCH, "cuda": gpu.SWITCH}
"""The environment variable that gives kernels up, by platform."""


def check_kernels(program: Program) -> None:
    """Compares attention by kernels with the textbook form on this process's first device of the mesh.

    Nothing is computed where a device has no kernels, or where they are given up.

    Raises:
        BeitJaxError: they differ, or the kernels do not compile or run.
    """
    own = [one for one in program.mesh.devices.flat if one.process_index == jax.process_index()]
    if own and own[0].platform in SWITCHES:
        config, parts = program.config, program.mesh.shape["tensor"]
        heads = config.num_attention_heads
        heads = heads if heads % parts else heads // parts
        tokens = 1 + config.grid[0] * config.grid[1]
        width = config.hidden_size // config.num_attention_heads
        check_attention(own[0], tokens, heads, width, jnp.dtype(program.recipe.model.dtype))


def check_attention(device: jax.Device, tokens: int, heads: int, width: int, dtype: Any) -> None:
    """Compares averages, and the gradients of queries, keys, values and position bias, of one image.

    Raises:
        BeitJaxError: as `check_kernels`.
    """
    rng = np.random.default_rng(0)
    shapes = (1, tokens, 3, heads, width), (1, heads, tokens, tokens), (1, tokens, heads, width)
    qkv, bias, upstream = (rng.standard_normal(shape, np.float32) for shape in shapes)
    given = jnp.asarray(qkv, dtype), jnp.asarray(bias), jnp.asarray(upstream, dtype)
    with jax.set_mesh(make_mesh((1, 1, 1), [device])):
        kernels = jax.jit(partial(_both_ways, attend))
        if "pallas_call" not in str(jax.make_jaxpr(kernels)(*given)):
            return
        try:
            found = jax.device_get(kernels(*given))
        except Exception as error:  # of a compiler or a driver, by whatever name
            raise _failed(device, f"do not run: {_first_line(error)}") from None
        expected = jax.device_get(jax.jit(partial(_both_ways, unwrap(attend)))(*given))
    apart = {name: _apart(found[name], expected[name]) for name in expected}
    wrong = {name: share for name, share in apart.items() if not share <= TOLERANCE}
    if wrong:
        said = ", ".join(f"{name} by {share:.2g}" for name, share in wrong.items())
        raise _failed(device, f"differ from the textbook form, of its norm: {said}")


def _both_ways(
    form: Any,
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "1 heads n n"],
    upstream: Float[Array, "b n heads e"],
) -> dict[str, Array]:
    averages, back = jax.vjp(lambda qkv, bias: form(qkv, bias)[0], qkv, bias)
    of_qkv, of_bias = back(upstream)
    gradients = {
        f"the gradient of {name}": of_qkv[:, :, part] for part, name in enumerate(("queries", "keys", "values"))
    }
    return {"averages": averages, **gradients, "the gradient of the position bias": of_bias}


def _apart(found: Array, expected: Array) -> float:
    mine, textbook = (np.asarray(one, np.float64) for one in (found, expected))
    return float(np.linalg.norm(mine - textbook) / np.linalg.norm(textbook))


def _failed(device: jax.Device, what: str) -> BeitJaxError:
    switch = SWITCHES.get(device.platform, tpu.SWITCH)
    return BeitJaxError(
        f"attention: the kernels {what} (on {printable(device.device_kind)}); {switch}=xla computes without them"
    )


def _first_line(error: Exception) -> str:
    return printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
