"""Options of runs that train an adapter (LoRA, DoRA) instead of all parameters. May import: the ground, `adapters`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from beit_jax.adapters.low_rank import Adapter, also_of, targets_of
from beit_jax.errors import BeitJaxError

from .recipe import POSITIVE, RATE, Range, Recipe, spelled

_PATCH, _TABLES = r".*/patch_kernel", r".*/((shared_)?bias_table|position_embeddings)"
CHANGES: Mapping[str, str] = {
    "image_size": _TABLES,
    "patch_size": f"{_PATCH}|{_TABLES}",
    "channels": _PATCH,
    "channels_from": _PATCH,
    "position_bias": _TABLES,
}
"""Options of conversion that change tensors outside the head: names, and patterns of the parameters."""

RANK = Range("a positive integer up to 4096", lambda value: 1 <= value <= 4096)


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA: of large kernels, thin factors learn; the head learns whole, and the rest stays. Defaults are peft's.

    Source: peft 0.21 `LoraConfig`; arXiv:2106.09685.
    """

    rank: Annotated[int | None, RANK] = None
    """Rank of the factors; without it there is no adapter, and all parameters learn."""
    targets: str = "q,v"
    """What is adapted, with commas between: q, k, v, qkv for all three, out, fc1, fc2."""
    alpha: Annotated[float, POSITIVE] = 8.0
    """Scale of the factors' product, over the rank."""
    rslora: bool = False
    """Divide alpha by the root of the rank instead (arXiv:2312.03732)."""
    dropout: Annotated[float, RATE] = 0.0
    """Dropout rate of what the factors are multiplied with."""
    dora: bool = False
    """DoRA: norms of the weights learn apart from their directions (arXiv:2402.09353)."""
    train_also: str | None = None
    """What learns whole beside the head, with commas between: norms, positions (bias tables), embeddings."""


@dataclass(frozen=True)
class AdaptableRecipe(Recipe):
    """A run whose model may learn by an adapter."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)

    def check(self) -> None:
        super().check()
        options = self.adapter
        if options.rank is None:
            defaults = asdict(AdapterOptions())
            for name, value in asdict(options).items():
                if value != defaults[name]:
                    raise BeitJaxError(
                        f"--adapter.{spelled(name)} {value}: there is no adapter without --adapter.rank; give it, or "
                        "leave this out"
                    )
        elif self.optim.freeze is not None:
            raise BeitJaxError(
                f"--optim.freeze {self.optim.freeze}: an adapter leaves everything but its factors and the head as it "
                "is (--adapter.rank); leave one of the two out"
            )
        else:
            adapter_of(self)


def adapter_of(recipe: Recipe) -> Adapter | None:
    """The adapter of a run; None where all parameters learn.

    Raises:
        BeitJaxError: it names what cannot be adapted.
    """
    if not isinstance(recipe, AdaptableRecipe) or recipe.adapter.rank is None:
        return None
    options = recipe.adapter
    return Adapter(
        rank=recipe.adapter.rank,
        targets=targets_of(options.targets),
        alpha=options.alpha,
        rslora=options.rslora,
        dropout=options.dropout,
        dora=options.dora,
        also=() if options.train_also is None else also_of(options.train_also),
    )


def changed_before(options: Iterable[str], names: Iterable[str]) -> set[str]:
    """The parameters that conversion has changed, so that they are not those of the checkpoint as it was published.

    Args:
        options: of the conversion, as far as they were given.
        names: flat names of the model's parameters.
    """
    patterns = [CHANGES[option] for option in options if option in CHANGES]
    return {name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)}


def published(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the checkpoint came from that an adapter is for; empty where its tensors are nobody's but a run's, or those
    of another adapter that was merged."""
    converted = "recipe" not in provenance and "adapter" not in provenance
    return provenance if converted else {}
