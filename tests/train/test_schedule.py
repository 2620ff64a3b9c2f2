"""Learning rates, step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit_jax.errors import BeitJaxError
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.schedule import poly_table, schedule_table, total_steps


def test_golden_values_of_the_original() -> None:
    """unilm's `cosine_scheduler(1.5e-3, 1e-5, epochs=800, niter_per_ep=625, warmup_epochs=10)`, run once in float64."""
    table = schedule_table(OptimOptions(lr=1.5e-3, min_lr=1e-5, epochs=800, warmup_epochs=10), 625)
    assert table.dtype == np.float32 and table.shape == (500_000,)
    golden = {0: 0.0, 6249: 1.5e-3, 6250: 1.5e-3, 6251: 0.0014999999999849196, -1: 1.00000000151e-5}
    assert {step: table[step] for step in golden} == {step: np.float32(rate) for step, rate in golden.items()}
    assert table[1] == pytest.approx(2.400384e-7, rel=1e-7)


@given(
    epochs=st.floats(1.0, 9.0),
    warmup=st.floats(0.0, 1.0),
    steps=st.integers(1, 40),
    start=st.floats(0.0, 1e-3),
    end=st.floats(0.0, 1e-3),
)
def test_up_to_the_peak_then_down_to_the_end(
    epochs: float, warmup: float, steps: int, start: float, end: float
) -> None:
    optim = OptimOptions(
        lr=2e-3, warmup_lr=start, min_lr=end, epochs=epochs, warmup_epochs=min(warmup * epochs, epochs)
    )
    table = schedule_table(optim, steps)
    rising = round(optim.warmup_epochs * steps)
    assert len(table) == total_steps(optim, steps) == round(epochs * steps)
    assert (np.diff(table[:rising]) > 0).all() and (np.diff(table[rising:]) < 0).all()
    assert np.isfinite(table).all() and table.max() <= np.float32(2e-3) and table.min() >= np.float32(min(start, end))
    if rising:
        assert table[0] == np.float32(start)
    if rising > 1:
        assert table[rising - 1] == np.float32(2e-3)
    if rising < len(table):
        assert table[rising] == np.float32(2e-3) and table[-1] > np.float32(end)


def mmcv_rate(step: int, steps: int, warmup: int, lr: float, min_lr: float, ratio: float) -> float:
    """What mmcv's hook sets before one iteration, from its description."""
    regular = (lr - min_lr) * (1 - step / steps) + min_lr
    if step >= warmup:
        return regular
    return regular * (1 - (1 - step / warmup) * (1 - ratio))


@pytest.mark.parametrize(("warmup", "min_lr"), [(15, 0.0), (0, 1e-5), (160, 0.0)])
def test_poly_is_the_hook_of_mmcv(warmup: int, min_lr: float) -> None:
    optim = OptimOptions(lr=7e-4, warmup_lr=7e-10, min_lr=min_lr, epochs=16, warmup_epochs=warmup / 10)
    expected = [mmcv_rate(step, 160, warmup, 7e-4, min_lr, 1e-6) for step in range(160)]
    np.testing.assert_allclose(poly_table(optim, 10), np.asarray(expected, np.float32), rtol=2e-7)


@pytest.mark.parametrize("table", [schedule_table, poly_table])
def test_a_run_without_steps_is_refused(table: object) -> None:
    assert callable(table)
    with pytest.raises(
        BeitJaxError, match=r"--optim.epochs: expected at least one step, found 0.04 epochs of 10 steps"
    ):
        table(OptimOptions(epochs=0.04, warmup_epochs=0.0), 10)
