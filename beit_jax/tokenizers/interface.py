"""The interface of a visual tokenizer, as pre-training uses it."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from beit_jax.models.interface import ArrayLike


@runtime_checkable
class Tokenizer(Protocol):
    """Images to visual tokens.

    Attributes:
        vocab_size: tokens are in [0, vocab_size).
        patch_size: pixels of one token, (height, width). A student with a grid of (rows, columns) patches needs the
            tokens of images with (rows, columns) * patch_size pixels.
        image_size: the (height, width) that the tokenizer was made for.
        value_range: the range of the pixels that the tokenizer takes. Pixels are not normalised otherwise.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def patch_size(self) -> tuple[int, int]: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def value_range(self) -> tuple[float, float]: ...

    def tokens(self, pixel_values: Float[ArrayLike, "b height width c"]) -> Int[Array, "b h w"]:
        """One token per patch, int32, rows from the top. May be traced.

        Raises:
            BeitJaxError: the tokenizer cannot take images of this shape.
        """
