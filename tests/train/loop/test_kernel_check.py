"""Before the first step the kernels of attention are compared with the textbook form, and failures are told."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.kernels import gpu, tpu, tpu_rows
from beit_jax.train.forecast.aot import abstract_program
from beit_jax.train.loop import kernel_check
from beit_jax.train.loop.kernel_check import check_attention, check_kernels
from beit_jax.train.recipes import recipe_named


def checked() -> None:
    with tpu.interpreted():
        check_attention(jax.devices()[0], 5, 2, 64, jnp.bfloat16)


def test_right_kernels_pass() -> None:
    checked()
    with gpu.interpreted():
        check_attention(jax.devices()[0], 5, 2, 16, jnp.bfloat16)


def test_a_wrong_kernel_is_told_with_what_is_wrong_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tpu_rows.backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        gradient, sums = right(*arguments, **options)
        return gradient, sums * 1.1

    monkeypatch.setattr(tpu_rows, "backward", wrong)
    with pytest.raises(BeitJaxError) as caught:
        checked()
    assert str(caught.value) == (
        "attention: the kernels differ from the textbook form, of its norm: the gradient of the position bias by 0.1 "
        "(on cpu); BEIT_JAX_TPU_ATTENTION=xla computes without them"
    )


def test_a_kernel_of_numbers_that_are_none_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tpu_rows.forward
    monkeypatch.setattr(tpu_rows, "forward", lambda *given, **options: right(*given, **options) * jnp.nan)
    with pytest.raises(BeitJaxError, match="averages by nan"):
        checked()


def test_a_kernel_that_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    real = jax.device_get

    def refused(_: Any) -> Any:
        monkeypatch.setattr(jax, "device_get", real)
        raise Refused("INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape\nand a stack of its own")

    monkeypatch.setattr(jax, "device_get", refused)
    with pytest.raises(
        BeitJaxError, match=r"the kernels do not run: INTERNAL: Mosaic .* shape \(on cpu\); BEIT_JAX_TPU"
    ):
        checked()


def test_given_up_kernels_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_rows, "forward", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setenv(tpu.SWITCH, "xla")
    checked()
    monkeypatch.setenv(tpu.SWITCH, "tiles")
    with pytest.raises(BeitJaxError, match=r"^BEIT_JAX_TPU_ATTENTION: expected rows or xla, found tiles"):
        checked()


@pytest.mark.parametrize(("platform", "asked"), [("tpu", True), ("gpu", True), ("cpu", False)])
def test_a_run_compares_its_own_devices_heads_and_tokens(
    platform: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_named("beit_base_ft1k")
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, mesh=(-1, 1, 1)))
    program = abstract_program(recipe, jax.devices()[:1])
    devices = SimpleNamespace(flat=[SimpleNamespace(platform=platform, process_index=index) for index in (1, 0)])
    mesh = SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 1, "tensor": 2})
    calls: list[Any] = []
    monkeypatch.setattr(kernel_check, "check_attention", lambda *given: calls.append(given))
    check_kernels(dataclasses.replace(program, mesh=mesh))
    assert calls == ([(devices.flat[1], 197, 6, 64, jnp.bfloat16)] if asked else [])
