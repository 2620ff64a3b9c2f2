"""Schedules, computed before a run starts, in float64: the learning rate, the decay of the average, the correction of
Adam's moments at every step."""

import numpy as np

from beit_jax.errors import BeitJaxError

from ..recipe import OptimOptions

MOST_STEPS = 10_000_000
"""The most steps of a run, ten times those of the longest published one: schedules are tables with a row for each."""


def total_steps(optim: OptimOptions, steps_per_epoch: int) -> int:
    """Optimizer steps of the run.

    Raises:
        BeitJaxError: the epochs make less than one step, or more than `MOST_STEPS`.
    """
    steps = round(optim.epochs * steps_per_epoch)
    if not 1 <= steps <= MOST_STEPS:
        expected = "at least one step" if steps < 1 else f"at most {MOST_STEPS:,} steps"
        raise BeitJaxError(
            f"--optim.epochs: expected {expected}, found {optim.epochs:g} epochs of {steps_per_epoch:,} steps"
        )
    return steps


def schedule_table(optim: OptimOptions, steps_per_epoch: int) -> np.ndarray:
    """Linear warmup, then half a cosine: [total_steps] float32.

    The warmup ends on the peak and the cosine begins with it, so that two steps have it; the last step stays just above
    `min_lr`. Source: microsoft/unilm@768a3c8 beit/utils.py, `cosine_scheduler`.
    """
    warmup, decay = _phases(optim, steps_per_epoch)
    rise = np.linspace(optim.warmup_lr, optim.lr, warmup)
    fall = optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1.0 + np.cos(np.pi * np.arange(decay) / max(decay, 1)))
    return np.concatenate([rise, fall]).astype(np.float32)


def poly_table(optim: OptimOptions, steps_per_epoch: int) -> np.ndarray:
    """Linear decay from the first step on, with a linear warmup multiplied onto it: [total_steps] float32.

    The published segmentation models have `warmup_lr` at 1e-6 times `lr`, and `min_lr` 0. Source: mmcv 1.x
    `PolyLrUpdaterHook` of power 1 with warmup "linear", as microsoft/unilm@768a3c8 beit/semantic_segmentation/configs.
    """
    warmup, decay = _phases(optim, steps_per_epoch)
    step = np.arange(warmup + decay)
    rates = optim.min_lr + (optim.lr - optim.min_lr) * (1.0 - step / len(step))
    missing = np.clip(1.0 - step / max(warmup, 1), 0.0, 1.0) * (1.0 - optim.warmup_lr / optim.lr) if warmup else 0.0
    return (rates * (1.0 - missing)).astype(np.float32)


def decay_table(optim: OptimOptions, steps: int) -> np.ndarray | None:
    """Decay of the moving average at every step, and one minus it, [steps, 2] float32; None without an average.

    Linear from `ema_start` to `ema` over `ema_steps`, then constant. Source: facebookresearch/data2vec_vision@af9a363
    beit/engine_for_cyclical.py.
    """
    if optim.ema is None:
        return None
    decays = np.full(steps, optim.ema)
    if optim.ema_start is not None:
        rising = min(optim.ema_steps, steps)
        decays[:rising] = optim.ema_start + np.arange(rising) * (optim.ema - optim.ema_start) / max(optim.ema_steps, 1)
    return np.stack([decays, 1.0 - decays], axis=1).astype(np.float32)


SPAN = 2**12
"""Steps of the finer of two tables that give Adam's correction together."""


def correction_tables(beta: float) -> tuple[np.ndarray, np.ndarray]:
    """``1 - beta**step``, which Adam divides a moment of decay `beta` by, for steps ``SPAN * high + low``.

    Computed in float32 from `beta`, it would be off by a thousand roundings: ``beta**step`` is close to 1 at first. Two
    tables are short for every `beta`, and need no number of steps.

    Returns:
        For every low, and for every high until nothing is missing from 1: float32. Of steps that are in neither alone
        the correction is ``high + (1 - high) * low``.
    """
    low = 1.0 - beta ** np.arange(SPAN, dtype=np.float64)
    high = 1.0 - beta ** (SPAN * np.arange(2**31 // SPAN, dtype=np.float64))  # steps are int32
    ends = 1 + int(np.searchsorted(high.astype(np.float32), np.float32(1.0)))
    return low.astype(np.float32), high[:ends].astype(np.float32)


def _phases(optim: OptimOptions, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of warmup, and the rest."""
    steps = total_steps(optim, steps_per_epoch)
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), steps)
    return warmup, steps - warmup
