"""Attention by the kernels of GPUs, interpreted: the values and gradients are those of the textbook form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_ways import both_ways, drawn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tracing import computed

from beit_jax.errors import BeitJaxError
from beit_jax.kernels import gpu, gpu_tiles
from beit_jax.models.attention import attend
from beit_jax.models.elementary import gelu
from beit_jax.models.position import attention_bias
from beit_jax.train.costs.work import work

AXES = ("data", "fsdp", "tensor")


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by kernels, and new to JAX."""

    def run(*arguments: Any) -> Any:
        with gpu.interpreted():
            return jax.jit(lambda *given: function(*given))(*arguments)

    return run


@pytest.mark.parametrize(
    ("grid", "heads", "width", "batch", "biased"),
    [((2, 3), 2, 16, 3, True), ((9, 9), 1, 32, 2, True), ((2, 3), 2, 16, 2, False)],
    ids=["one tile", "two tiles", "without a bias"],
)
def test_it_is_the_textbook_form(grid: tuple[int, int], heads: int, width: int, batch: int, biased: bool) -> None:
    arguments = [jnp.asarray(array, jnp.float32) for array in drawn(grid, heads, width, batch)]
    function = partial(both_ways, grid, biased)
    found, expected = interpreted(function)(*arguments), computed(function, *arguments, several=True)
    assert "attention_tiles" in str(jax.make_jaxpr(interpreted(function))(*arguments))
    for mine, textbook in zip(found[: 4 + biased], expected, strict=False):
        assert mine.dtype == textbook.dtype and mine.shape == textbook.shape
        assert float(jnp.abs(mine - textbook).max()) <= 1e-5 * float(jnp.abs(textbook).max())


@pytest.mark.parametrize(("grid", "width"), [((4, 4), 16), ((9, 9), 32)])
def test_in_bfloat16_it_is_as_near_to_the_exact_values_as_the_textbook_form(grid: tuple[int, int], width: int) -> None:
    arrays = drawn(grid, 2, width, 2)
    given = jnp.asarray(arrays[0], jnp.bfloat16), jnp.asarray(arrays[1], jnp.float32), jnp.asarray(arrays[2])
    function = partial(both_ways, grid, True)
    found, textbook = interpreted(function)(*given), computed(function, *given, several=True)
    with jax.enable_x64(True):
        exact = computed(function, *(jnp.asarray(np.asarray(array, np.float64)) for array in given), several=True)
    for mine, theirs, true in zip(found, textbook, exact, strict=True):
        mine, theirs, true = (np.asarray(array, np.float64) for array in (mine, theirs, true))
        assert 0 < np.linalg.norm(mine - true) <= 1.01 * np.linalg.norm(theirs - true)


def test_biases_of_several_shards_have_gradients_of_their_own() -> None:
    qkv, table, upstream = (jnp.asarray(array, jnp.float32) for array in drawn((2, 2), 2, 16, 4))
    bias = jnp.stack([attention_bias(table, (2, 2), (2, 2), "bicubic", 1).written[0] * part for part in (1, 2)])

    def of_bias(qkv: Any, bias: Any) -> Any:
        return jax.vjp(lambda bias: attend(qkv, bias)[0], bias)[1](upstream)[0]

    found, (expected,) = interpreted(of_bias)(qkv, bias), computed(of_bias, qkv, bias, several=True)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_the_samples_of_a_shard_are_divided_to_fill_a_card() -> None:
    """Chunks divide the samples; a large bias needs none."""
    assert gpu_tiles.Shape(64, 197, 12, 64, 1).chunks == 8  # 16 tiles of 12 heads
    assert gpu_tiles.Shape(32, 577, 16, 64, 1).chunks == 1
    assert gpu_tiles.Shape(6, 5, 1, 64, 2).chunks == 3  # as many as there are samples


def mesh_of(sizes: tuple[int, ...], kind: str = "NVIDIA H100 80GB HBM3", platform: str = "gpu") -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh(sizes, AXES, (AxisType.Auto,) * 3, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def traced_kernels(batch: int, dtype: Any = jnp.bfloat16, width: int = 64, **options: Any) -> int:
    """The number of kernels in attention, as it is traced without interpreting them."""
    qkv = jax.ShapeDtypeStruct((batch, 5, 3, 2, width), dtype)
    return str(jax.make_jaxpr(lambda qkv: attend(qkv, None, **options)[0])(qkv)).count("name=attention_tiles")


def test_where_there_are_no_kernels_the_textbook_form_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_capability", lambda: 90)
    assert traced_kernels(4) == 0  # without a mesh
    with mesh_of((1, 1, 1), platform="cpu", kind="cpu"):
        assert traced_kernels(4) == 0
    for sizes in ((1, 1, 1), (4, 1, 1), (1, 2, 2)):
        with mesh_of(sizes):
            assert traced_kernels(4) == 1
            assert traced_kernels(4, jnp.float32) == traced_kernels(4, width=48) == 0
            assert traced_kernels(4, output_attentions=True) == traced_kernels(4, drop=lambda weights: 2 * weights) == 0
    with mesh_of((4, 1, 1)):
        assert traced_kernels(6) == 0
    with mesh_of((1, 1, 1)):
        monkeypatch.setenv(gpu.SWITCH, "xla")
        assert traced_kernels(4) == 0
        monkeypatch.setenv(gpu.SWITCH, "flash")
        with pytest.raises(BeitJaxError, match=f"{gpu.SWITCH}: expected tiles or xla, found flash"):
            traced_kernels(4)
        monkeypatch.delenv(gpu.SWITCH)
        monkeypatch.setattr(gpu, "_capability", lambda: 75)
        assert traced_kernels(4) == 0


def test_gelu_has_its_derivative_written_out_on_gpus_and_tpus() -> None:
    x = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    with mesh_of((1, 1, 1)):
        assert "erfc" not in str(jax.make_jaxpr(lambda x: gelu(x))(x))
    with mesh_of((1, 1, 1), kind="TPU v5 lite", platform="tpu"):
        assert "erfc" not in str(jax.make_jaxpr(lambda x: gelu(x))(x))


def test_what_a_kernel_states_counts() -> None:
    """As XLA writes the call of a kernel, shortened."""
    flops = gpu_tiles.Shape(64, 197, 12, 64, 1).products(7)["flops"]
    text = f"""HloModule step

ENTRY %main (qkv: bf16[64,197,3,12,64]) -> bf16[64,197,3,12,64] {{
  %qkv = bf16[64,197,3,12,64]{{4,3,2,1,0}} parameter(0)
  ROOT %k = bf16[64,197,3,12,64]{{4,3,2,1,0}} custom-call(%qkv), custom_call_target="__gpu$xla.gpu.triton", backend_config={{grid_x = 4 : i32, ir = "ML\\EFR", serialized_metadata = "{{\\22flops\\22: \\22{flops}\\22}}"}}
}}
"""  # noqa: E501
    found = work(text, 1)
    assert found.flops == float(flops) == 2 * 7 * 64 * 12 * 197**2 * 64
    assert found.traffic == 2 * 2 * 64 * 197 * 3 * 12 * 64 and found.unknown == ()
