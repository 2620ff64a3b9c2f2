"""What of a model learns: parameters divided into those that steps move and those that stay, and joined again."""

from jaxtyping import Array, Key

from beit_jax.tree import Nested, flatten, unflatten


class Division:
    """How a model's parameters are divided, and made again of the two parts. This one divides nothing: all learn.

    The parts are `State.params`, which gradients move, and `State.fixed`, which nothing moves. Both are named by flat
    names, by which they lie on devices (`distributed.sharding.RULES`), decay and learn at their layer's rate
    (`optim.DECAY`, `optim.DEPTH`). A part may hold other arrays than the model: rows of a stacked leaf, factors of a
    kernel. Only `join` knows what they mean; the step differentiates through it, and evaluation and results read what
    it returns. Its subclasses are what freezing and adapters are.

    Attributes:
        fixed_blocks: numbers, from 0, of the blocks whose rows `params` does not hold.
    """

    fixed_blocks: tuple[int, ...] = ()

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The numbers of the blocks, of so many, whose rows `params` holds."""
        return tuple(number for number in range(depth) if number not in self.fixed_blocks)

    def divide(self, params: Nested, key: Key[Array, ""]) -> tuple[Nested, Nested]:
        """(params, fixed) at the start of a run. Takes arrays or shapes, under a trace.

        Args:
            params: all parameters of the model, from a checkpoint or drawn, float32, nested.
            key: for what is drawn.
        """
        return params, {}

    def join(self, params: Nested, fixed: Nested) -> Nested:
        """All parameters of the model, nested, under the model's own names: what `divide` was given. Traceable.

        Args:
            params: what learns, or its moving average.
        """
        return unflatten(flatten(params) | flatten(fixed)) if fixed else params

    def trained(self, params: Nested, fixed: Nested, key: Key[Array, ""] | None) -> Nested:
        """What the model of a training step is merged from; it may hold kernels that multiply by themselves.

        Args:
            key: of what is dropped between `params` and `fixed`; None: nothing is.
        """
        return self.join(params, fixed)


EVERYTHING = Division()
"""All parameters learn."""
