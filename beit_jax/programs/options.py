"""What a program may be told to be. The command line makes options of the fields, so this module imports no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Final, Literal

from tyro.conf import arg

from beit_jax.errors import BeitJaxError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ProgramOptions:
    """Options of --to stablehlo and --to onnx."""

    batch: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """stablehlo: images of every call, for programs that older releases of jax call too; by default any number."""
    features: Annotated[bool, arg(help_behavior_hint="")] = False
    """Hidden states and pooled features of a model that has a head, in place of what the head gives."""
    free_sides: Annotated[bool, arg(help_behavior_hint="")] = False
    """stablehlo: any height and width that the patch divides, of models without position tables."""
    precision: Annotated[Precision | None, arg(metavar="DTYPE", help_behavior_hint="")] = None
    """stablehlo: what products are computed in, float32 or bfloat16; by default float32. Weights stay float32."""
    jax_floor: Annotated[str | None, arg(metavar="VERSION", help_behavior_hint="")] = None
    """stablehlo: the oldest jax that must call the program with any batch; by default the one that writes it."""

    @property
    def dtype(self) -> Precision:
        return self.precision or "float32"

    @property
    def free(self) -> bool:
        """True if any size is free, which the program checks when it is called."""
        return self.batch is None or self.free_sides

    def check(self) -> None:
        """Refuses numbers out of range.

        Raises:
            BeitJaxError: names the option.
        """
        if self.batch is not None and not 1 <= self.batch <= 1 << 16:
            raise BeitJaxError(f"--batch: expected 1 to {1 << 16:,} images, found {self.batch}")

    def given(self) -> list[str]:
        """The names of the options that differ from their defaults: "--batch"."""
        return ["--" + item.name.replace("_", "-") for item in fields(self) if getattr(self, item.name) != item.default]


DEFAULT: Final = ProgramOptions()
TARGETS: Final[Mapping[str, tuple[str, ...]]] = {
    "stablehlo": ("--batch", "--features", "--free-sides", "--precision", "--jax-floor"),
    "onnx": ("--features",),
}
"""The kinds of programs, by their names for --to, and the options that each takes."""


def refuse_unused(options: ProgramOptions, to: str) -> None:
    """Refuses options that an export to `to` would not use.

    Raises:
        BeitJaxError: names the first, and what takes it.
    """
    unused = [option for option in options.given() if option not in TARGETS.get(to, ())]
    if unused:
        takers = " or ".join(f"--to {target}" for target, taken in TARGETS.items() if unused[0] in taken)
        raise BeitJaxError(f"{unused[0]}: of {takers}, found --to {to}; leave it out")
