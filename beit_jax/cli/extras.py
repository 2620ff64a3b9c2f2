"""The optional packages of an installation, and what to say where they are missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from beit_jax.errors import BeitJaxError


@contextmanager
def train_extra() -> Iterator[None]:
    """Encloses imports that need the extra `train`.

    Raises:
        BeitJaxError: a package is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BeitJaxError(f"{error.name} is not installed; pip install 'beit-jax[train]'") from None
