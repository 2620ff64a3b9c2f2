"""Arguments that many commands take. As in `beit_jax.cli.main`, imports wait until a command runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

if TYPE_CHECKING:
    from beit_jax.hub import Source

SourceName = Annotated[
    str,
    arg(
        metavar="SOURCE",
        help="A directory in Hugging Face format, a weight file in one, a native checkpoint, or a hub name.",
    ),
]
Json = Annotated[bool, arg(help="Print JSON for programs instead of text for people.")]


@dataclass(frozen=True)
class Hub:
    """Options for a hub name such as microsoft/beit-base-patch16-224.

    Token, endpoint and offline mode are huggingface_hub's environment variables (HF_TOKEN, HF_HUB_OFFLINE=1, ...).
    """

    revision: str | None = None
    """Branch, tag or commit."""
    cache_dir: Path | None = None
    """Where downloads are kept; by default huggingface_hub's cache."""

    def resolve(self, name: str) -> "Source":
        """As `beit_jax.hub.resolve`."""
        from beit_jax.hub import resolve

        return resolve(name, revision=self.revision, cache_dir=self.cache_dir)
