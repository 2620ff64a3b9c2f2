"""What an upload may be told. The command line makes options of the fields: this imports no huggingface_hub."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Final

from tyro.conf import arg

from beit_jax.errors import BeitJaxError, printable

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9._-]{0,94}(?<![.-])")
_LICENCE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True)
class PushOptions:
    """Options of an upload to the Hugging Face hub.

    huggingface_hub's own sign-in is used: hf auth login, or HF_TOKEN.
    """

    push: Annotated[str | None, arg(metavar="OWNER/NAME", help_behavior_hint="")] = None
    """Upload DEST to this repository of the hub, with a model card. What is uploaded is listed first."""
    license: Annotated[str | None, arg(metavar="LICENCE", help_behavior_hint="")] = None
    """With --push: the licence of the weights, as the hub abbreviates it: apache-2.0, mit, cc-by-nc-4.0, other."""
    private: Annotated[bool, arg(help_behavior_hint="")] = False
    """With --push: a new repository is private."""
    into_existing: Annotated[bool, arg(help_behavior_hint="")] = False
    """With --push: the repository may hold files already. Those of the same names are replaced, others stay."""

    def check(self) -> None:
        """Refuses options that contradict each other, before anybody is asked.

        Raises:
            BeitJaxError: names the option.
        """
        if self.push is None:
            given = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
            if given:
                option = f"--{given[0].replace('_', '-')}"
                raise BeitJaxError(f"{option}: of --push OWNER/NAME, which was not given; give both")
            return
        if not _REPOSITORY.fullmatch(self.push) or self.push.endswith(".git"):
            raise BeitJaxError(f"--push {printable(self.push)}: expected OWNER/NAME, such as your-name/beit-birds")
        if self.license is None:
            raise BeitJaxError(
                "--push: the model card names the licence of the weights, which this library does not know; give "
                "--license apache-2.0 or what the page of their source says, or --license other"
            )
        if not _LICENCE.fullmatch(self.license):
            raise BeitJaxError(
                f"--license {printable(self.license)}: expected an abbreviation of the hub's, such as apache-2.0, mit, "
                "cc-by-nc-4.0 or other"
            )
