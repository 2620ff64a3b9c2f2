"""transformers' model of a checkpoint, with the tensors of the file itself, or a refusal."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG
from beit_jax.json_file import read_json

from .formats.format import TRANSPOSED, is_transposed
from .importer import Plan


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Says that transformers cannot take what a ``config.json`` describes.

    Raises:
        BeitJaxError: in the place of any error; the libraries that check a configuration raise errors of many classes.
    """
    try:
        yield
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise BeitJaxError(f"{file}: transformers refuses it ({reason}): nothing to compare with") from None


class Reference:
    """transformers' model in float32, every tensor of which is the one that the file has under its name.

    Attributes:
        model: in evaluation mode, with attention computed step by step.
        notes: lines for the user: what `from_pretrained`, by which others load the same file, makes of it.

    Raises:
        BeitJaxError: torch or transformers is not installed; transformers has no such model, or does not read the names
            of the file.
    """

    def __init__(self, decided: Plan):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise BeitJaxError(f"parity needs PyTorch ({error}): pip install 'beit-jax[torch]'") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._plan = decided
        config, where = decided.config, decided.source.name
        if config.feature_taps == "original" and config.task in ("semantic_segmentation", "backbone"):
            raise BeitJaxError(
                f"{where}: its head reads the blocks it was trained on (feature_taps: original), for which "
                "transformers has no setting: nothing to compare with"
            )
        if config.use_key_bias or config.use_sub_norm or config.embedding_size:
            raise BeitJaxError(
                f"{where}: transformers' BEiT has no bias of the keys, no norms within its branches and no embedding: "
                "nothing to compare with; beit-jax export --to timm writes what timm computes"
            )
        file = decided.source.directory / CONFIG
        content = read_json(file) if file.exists() else {}
        if content.get("model_type") != config.model_type or decided.hosted:
            raise self._unread("its configuration is not that of transformers' model")
        self._kind = getattr(transformers, config.to_hf()["architectures"][0])
        self._options = {"add_pooling_layer": config.has_pooler} if config.task == "features" else {}
        with refusing(file):
            self._config = self._kind.config_class.from_dict(content)
            self._config._attn_implementation = "eager"
            self.model = self._kind(self._config, **self._options).float().eval()
        state = self.model.state_dict()
        tensors = {
            theirs: torch.from_numpy(decided.checkpoint.read(name).astype(np.float32))
            for name, theirs in self._names(state).items()
        }
        self.model.load_state_dict(state | tensors, strict=True)
        with refusing(file):
            self.notes = (*self._from_pretrained(tensors), *(TRANSPOSED,) * is_transposed(config))

    def _names(self, state: dict[str, Any]) -> dict[str, str]:
        """The name in transformers' model of every tensor in the file. All learned tensors of both are in it."""
        learned = self._learned(self._plan.checkpoint.tensors)
        wanted = self._learned(state)
        prefix = f"{self.model.base_model_prefix}."
        for naming in (self._in_files(state), {name: name for name in state}):
            for stripped in ("", prefix):  # an encoder may have been saved with a prefix that it does not have alone
                names = {name: naming.get(name.removeprefix(stripped)) for name in learned}
                if set(names.values()) == wanted and len(names) == len(wanted):
                    return {name: str(theirs) for name, theirs in names.items()}
        raise self._unread(f"it reads other names than {self._plan.naming.name} files have")

    def _learned(self, names: Collection[str]) -> set[str]:
        return {name for name in names if not self._plan.naming.derived.search(name)}

    def _in_files(self, state: dict[str, Any]) -> dict[str, str]:
        """The name in memory of every tensor by the name that transformers gives it in files."""
        from transformers.core_model_loading import revert_weight_conversion

        names = {id(tensor): name for name, tensor in state.items()}
        reverted = revert_weight_conversion(self.model, dict(state))
        return {name: names[id(tensor)] for name, tensor in reverted.items() if id(tensor) in names}

    def _from_pretrained(self, tensors: dict[str, Any]) -> tuple[str, ...]:
        """Says which tensors `from_pretrained` of the installed version fills with other values than the file has."""
        import torch
        import transformers

        named = {theirs: name for name, theirs in self._in_files(self.model.state_dict()).items()}
        given = {named.get(theirs, theirs): tensor for theirs, tensor in tensors.items()}
        loaded = self._kind.from_pretrained(
            None, config=self._config, state_dict=given, dtype=torch.float32, **self._options
        ).state_dict()
        wrong = sorted(named.get(name, name) for name in tensors if not torch.equal(loaded[name], tensors[name]))
        if not wrong:
            return ()
        return (
            f"from_pretrained of transformers {transformers.__version__} gives {', '.join(wrong)} other values than "
            "the file has; compared with the file's own values, which load_state_dict gives",
        )

    def _unread(self, reason: str) -> BeitJaxError:
        return BeitJaxError(
            f"{self._plan.source.name}: transformers does not read it, {reason}: to compare, convert SOURCE NATIVE, "
            "export NATIVE DIRECTORY, then parity DIRECTORY"
        )
