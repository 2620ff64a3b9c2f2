"""Two wrong calls that mypy must see: from `beit_jax` into `beit_jax.convert` and into `beit_jax.train`.

`.ci/types` checks this file as a module of `beit_jax`. Each comment `type: ignore` takes exactly one error away; mypy
reports the comment itself as unused where it does not see that error.
"""

from beit_jax.convert.options import Options
from beit_jax.train.recipe import HostOptions


def into_convert() -> Options:
    return Options(nonsense=1)  # type: ignore[call-arg]


def into_train() -> HostOptions:
    return HostOptions(nonsense=1)  # type: ignore[call-arg]
