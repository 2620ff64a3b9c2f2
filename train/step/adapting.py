"""Adapters: factors of some kernels learn, and the head; the kernels themselves and the rest are fixed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Key

from beit_jax.adapters.file import AdapterRecord
from beit_jax.adapters.low_rank import Adapter, adapted, initial_factors, merged, without_factors
from beit_jax.tree import Nested, flatten, unflatten

from .division import Division

_DROPOUT = 0xADA  # the branch of a step's key from which factors drop


@dataclass(frozen=True)
class Adapted(Division):
    """A model that learns by an adapter. `State.params` holds the factors, and what is trained whole."""

    adapter: Adapter

    def divide(self, params: Nested, key: Key[Array, ""]) -> tuple[Nested, Nested]:
        flat, factors = flatten(params), initial_factors(self.adapter, params, key)
        whole = {name: leaf for name, leaf in flat.items() if self.adapter.learns_whole(name)}
        fixed = {name: leaf for name, leaf in flat.items() if name not in whole}
        return unflatten(whole | factors), unflatten(fixed)

    def join(self, params: Nested, fixed: Nested) -> Nested:
        return merged(self.adapter, _both(params, fixed))

    def trained(self, params: Nested, fixed: Nested, key: Key[Array, ""] | None) -> Nested:
        return adapted(self.adapter, _both(params, fixed), None if key is None else jax.random.fold_in(key, _DROPOUT))

    def record(self, params: Nested, new: Iterable[str], base: Mapping[str, Any]) -> AdapterRecord:
        """What a result keeps beside the merged model.

        Args:
            params: `State.params`, or their moving average.
            new: flat names of the parameters and statistics that are not the base's, whether they learned or not.
            base: the record of where the base came from.
        """
        _, factors = without_factors(params)
        whole = {name for name in flatten(params) if name not in factors}
        return AdapterRecord(self.adapter, factors, tuple(sorted({*whole, *new})), base)


def _both(params: Nested, fixed: Nested) -> Nested:
    return unflatten(flatten(params) | flatten(fixed))
