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
        blocks: the numbers, from 0, of the blocks whose rows `params` holds, in their order; None: of all blocks.
    """

    blocks: tuple[int, ...] | None = None

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
