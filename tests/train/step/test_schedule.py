"""Learning rates, step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit_jax.errors import BeitJaxError
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step.schedule import decay_table, poly_table, schedule_table, total_steps


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


# --- The moving average's decay ---------------------------------------------------------------------------------------


def test_golden_decays_of_data2vec() -> None:
    """Its command's defaults: from .999 to .9998 over 25000 updates. The published runs hold .9998 from the start."""
    annealed = decay_table(OptimOptions(ema=0.9998, ema_start=0.999, ema_steps=25_000), 25_003)
    assert annealed is not None and annealed.dtype == np.float32 and annealed.shape == (25_003, 2)
    golden = {0: 0.999, 1: 0.999000032, 12_500: 0.9994, 24_999: 0.999799968, 25_000: 0.9998, 25_002: 0.9998}
    for step, decay in golden.items():
        assert annealed[step].tolist() == pytest.approx([decay, 1 - decay], rel=1e-7), step
    constant = decay_table(OptimOptions(ema=0.9998), 4)
    assert np.array_equal(constant, np.tile(np.array([0.9998, 0.0002], np.float32), (4, 1)))


def test_one_minus_the_decay_has_all_digits_of_float32() -> None:
    """From the decay in float32, it would have three or four: 0.00019997 for 0.0002."""
    table = decay_table(OptimOptions(ema=0.9998), 1)
    assert table is not None and table[0, 1] == np.float32(0.0002)
    assert abs((np.float32(1.0) - table[0, 0]) / np.float32(0.0002) - 1) > 1e-4


@given(start=st.floats(0.0, 0.99999), end=st.floats(0.0, 0.99999), rising=st.integers(1, 60), steps=st.integers(1, 90))
def test_decays_go_straight_from_start_to_end_and_stay(start: float, end: float, rising: int, steps: int) -> None:
    """Also where the run is shorter than the rise: it is not squeezed into the run."""
    table = decay_table(OptimOptions(ema=end, ema_start=start, ema_steps=rising), steps)
    assert table is not None and table.shape == (steps, 2)
    expected = [end if step >= rising else start + step * (end - start) / rising for step in range(steps)]
    np.testing.assert_allclose(table[:, 0], expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(table[:, 1], 1.0 - np.asarray(expected), rtol=1e-6)
    assert table[0, 0] == np.float32(start) and (table[rising:, 0] == np.float32(end)).all()


def test_no_average_has_no_decays() -> None:
    assert decay_table(OptimOptions(), 5) is None
    assert np.array_equal(decay_table(OptimOptions(ema=0.0), 2), [[0.0, 1.0], [0.0, 1.0]])
