"""The loss that a step differentiates, with the preparation of its batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int, Key

from beit_jax.tree import Nested

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@dataclass(frozen=True)
class Criterion:
    """A loss with the preparation of its batch.

    Attributes:
        prepare: takes a batch as the data pipeline makes it (arrays [b, ...]) and a key, and returns what `loss` reads,
            on the device. It sees the whole batch, so that the pairing of samples does not depend on how the batch is
            computed.
        loss: takes the model, a batch or a part of one, a key for dropout, and the parameters of the second network
            that the state keeps: the frozen one, else the moving average, else None. Returns the mean loss, float32,
            and more scalars to log. The model's running statistics may move: the step carries them on. Without a key
            nothing is drawn, and the statistics stay: this is evaluation.
        schedule: takes the number of the step and returns scalars that follow from the number alone; `loss` finds the
            scalars in its batch.
    """

    prepare: Callable[[Batch, Key[Array, ""]], Batch]
    loss: Callable[[Any, Batch, Key[Array, ""] | None, Nested | None], tuple[Float[Array, ""], Metrics]]
    schedule: Callable[[Int[Array, ""]], Metrics] = lambda step: {}
