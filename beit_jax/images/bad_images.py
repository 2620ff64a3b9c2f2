"""Images that cannot be read: without a limit the first one is an error, with a limit they are left out and named."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from beit_jax.errors import BeitJaxError

MAX_BAD: Final = 0.1
"""The share of images that may be left out by default, where leaving out is asked for."""

T = TypeVar("T")


def allowed(total: int, share: float) -> int:
    """The number of images that may be left out of `total`: a share above 0 allows at least one."""
    return math.ceil(total * share)


@dataclass
class BadImages:
    """The images of a task that could not be read so far.

    Attributes:
        total: the number of all images of the task.
        share: the share of them that may be left out; 0: none.
        reasons: by the place of a bad image among all, one line that names it; in the order in which they were found.
    """

    total: int
    share: float = 0.0
    reasons: dict[int, str] = field(default_factory=dict)

    def note(self, place: int, error: BeitJaxError) -> None:
        """Records a bad image.

        Raises:
            BeitJaxError: `error` itself if no image may be left out; or more are bad than allowed.
        """
        if not self.share:
            raise error
        self.reasons[place] = str(error)
        check_bad(len(self.reasons), self.total, self.share, str(error))

    def kept(self, images: Sequence[T]) -> list[T]:
        """What is not left out of a value for every image."""
        return [image for place, image in enumerate(images) if place not in self.reasons]

    def lines(self) -> list[str]:
        """A line for people for every image that was left out."""
        return [f"left out     {reason}" for reason in self.reasons.values()]


def check_bad(bad: int, total: int, share: float, last: str) -> None:
    """Refuses more bad images than the share allows.

    Args:
        last: the reason of the last one.

    Raises:
        BeitJaxError: says how many, and how many are allowed; or that none is left.
    """
    if bad == total:
        raise BeitJaxError(f"none of {total} images can be read; the last: {last}")
    limit = allowed(total, share)
    if bad > limit:
        raise BeitJaxError(
            f"{bad} of {total} images cannot be read, --max-bad {share:g} allows {limit}; the last: {last}"
        )
