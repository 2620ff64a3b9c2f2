"""The state dict of a pickled module: its parameters under the names ``module.state_dict()`` would give them.

Only OpenAI's two DALL-E networks are published in this way. `names` decides which classes may be records; this module
walks the attributes of those records as plain data.
"""

from collections.abc import Iterator

from beit_jax.errors import BeitJaxError, printable

from .names import Module, PickledTensor, UnsupportedTensor

ROOTS = ("dall_e.encoder.Encoder", "dall_e.decoder.Decoder")
_MAX_NAME = 500
_MAX_MEMBERS = 20_000  # OpenAI's modules have under 500 modules and tensors

Tensor = PickledTensor | UnsupportedTensor


def module_tensors(root: Module, label: str) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, such as ``blocks.group_1.block_1.res_path.conv_1.w``.

    Args:
        label: the file, for messages.

    Raises:
        BeitJaxError: a module of another class than `ROOTS`, or one whose attributes are not a module's.
    """
    if root.kind not in ROOTS:
        raise BeitJaxError(
            f"{label} is a whole-module pickle of {root.kind}; expected {' or '.join(ROOTS)}, or a state dict"
        )
    tensors: dict[str, Tensor] = {}
    for name, value in _Walk(label).parameters(root):
        if not isinstance(value, Tensor) or name in tensors:
            raise BeitJaxError(f"{label} is damaged: {printable(name)} is not one tensor of a module")
        tensors[name] = value
    return tensors


class _Walk:
    """One walk over a module. It counts members, because a pickle can be a graph, even one that holds itself."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._left = _MAX_MEMBERS

    def parameters(self, root: Module) -> Iterator[tuple[str, object]]:
        """Yields every parameter and buffer with its name."""
        waiting = [("", root)]
        while waiting:
            prefix, module = waiting.pop()
            for table in ("_parameters", "_buffers"):
                for name, value in self._entries(module, table, prefix):
                    if value is not None:  # torch sets a parameter that a module lacks, such as a bias, to None
                        yield name, value
            for name, child in self._entries(module, "_modules", prefix):
                if not isinstance(child, Module):
                    raise BeitJaxError(f"{self._label} is damaged: {printable(name)} is no module")
                waiting.append((f"{name}.", child))

    def _entries(self, module: Module, table: str, prefix: str) -> Iterator[tuple[str, object]]:
        entries = module.attributes.get(table)
        if not isinstance(entries, dict):
            raise BeitJaxError(f"{self._label} is damaged: {printable(prefix or 'the module')} has no {table}")
        for key, value in entries.items():
            self._left -= 1
            if self._left < 0:
                raise BeitJaxError(f"{self._label} nests more than {_MAX_MEMBERS} modules and tensors")
            if not isinstance(key, str) or len(prefix) + len(key) > _MAX_NAME:
                raise BeitJaxError(f"{self._label} is damaged: {printable(prefix or 'the module')} has a member "
                                   f"{printable(key)}; expected a name of at most {_MAX_NAME} characters")  # fmt: skip
            yield prefix + key, value
