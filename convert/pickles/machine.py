"""Run a pickle without importing or calling anything that it names.

`pickle.Unpickler` imports what the stream asks for. This machine knows the opcodes that protocols 2 to 5 write for
data, and the closed table of names in `names`. It notes every other name in `forbidden` and goes on with a record that
stands for nothing; the caller refuses the file and lists these names. The length of the stream, the limit of opcodes
and the budget of `_spend` bound time and memory.

Opcodes and the layout of their arguments: the standard library's `pickletools`.
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from .names import (
    CONSTRUCTORS,
    ITEM_SIZES,
    Blob,
    Constructor,
    Forbidden,
    Global,
    Module,
    Namespace,
    NumpyDtype,
    PickleError,
    Record,
    Storage,
    is_plain_name,
)

MAX_OPCODES = 2_000_000  # a BEiT-large training checkpoint has about 50 thousand
MAX_PICKLE = 64 * 2**20
_MAX_FORBIDDEN = 1000


class PickleMachine:
    """Runs the pickles of one file.

    Attributes:
        forbidden: the names in the stream that are not known, in order; the values mean nothing.
        storages: the storages that the stream mentions, by key.
    """

    def __init__(
        self,
        constructors: Mapping[str, Constructor] = CONSTRUCTORS,
        max_opcodes: int = MAX_OPCODES,
        longest: int | None = None,
    ) -> None:
        """`constructors` is the closed table of what the stream may call.

        Strings of more than `longest` bytes stay in the stream, as a `Blob` each; by default none does.
        """
        self._constructors, self._max_opcodes, self._longest = constructors, max_opcodes, longest
        self.forbidden: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self._budget = MAX_PICKLE

    def run(self, stream: BinaryIO) -> object:
        """Returns the object that the next pickle of `stream` describes, and leaves `stream` just behind the pickle.

        Raises:
            PickleError: the pickle is damaged, larger than the bounds, or asks for what no checkpoint needs.
        """
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # the stacks under each open MARK
        self._memo: dict[int, object] = {}
        try:
            for count, (name, arg) in enumerate(_tokens(stream, self._longest)):
                if count >= self._max_opcodes:
                    raise PickleError(f"has more than {self._max_opcodes} opcodes")
                self._step(name, arg)
            return self._stack.pop()
        except PickleError:
            raise
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            # pickletools raises these for a damaged stream; so do the handlers, at an empty stack or a wrong type.
            raise PickleError(f"is damaged ({error})") from None

    def _step(self, name: str, arg: object) -> None:
        if name in _PUSHED:
            if self._longest is not None and isinstance(arg, str | bytes | bytearray):
                self._spend(len(arg))  # the stream itself is not bounded then
            self._stack.append(arg)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _HANDLERS:
            _HANDLERS[name](self, arg)

    def _spend(self, count: int) -> None:
        """Takes `count` bytes from the budget: a few opcodes can make more bytes than they are long."""
        self._budget -= count
        if self._budget < 0:
            raise PickleError(f"unpacks to more than {MAX_PICKLE} bytes")

    def _mark(self, arg: object) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[object]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _tuple(self, arg: object) -> None:
        items = tuple(self._pop_mark())  # first, because it replaces `_stack`
        self._stack.append(items)

    def _tuple_of(self, count: int) -> None:
        items = tuple(self._stack.pop() for _ in range(count))
        self._stack.append(items[::-1])

    def _append(self, arg: object) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, arg: object) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[object]) -> None:
        match self._stack[-1]:
            case list() as target:
                target.extend(items)
            case Forbidden():
                pass
            case target:
                raise PickleError(f"appends to a {type(target).__name__}")

    def _setitem(self, arg: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _setitems(self, arg: object) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, Forbidden):
            return
        if not isinstance(target, dict):
            raise PickleError(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, Record):
                key = key.text()
            # Keys must hash in bounded time. Large integers and nested tuples can be made with equal hashes.
            if not (isinstance(key, str | bool | None) or (isinstance(key, int) and abs(key) < 2**31)):
                raise PickleError(f"has a dictionary key of type {type(key).__name__}")
            if key in target:
                raise PickleError(f"has the key {key!r} twice in one dictionary")
            target[key] = value

    def _put(self, arg: object) -> None:
        assert isinstance(arg, int)
        self._memo[arg] = self._stack[-1]

    def _memoize(self, arg: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, arg: object) -> None:
        assert isinstance(arg, int)
        self._stack.append(self._memo[arg])

    def _global(self, arg: object) -> None:
        self._stack.append(self._lookup(str(arg)))

    def _stack_global(self, arg: object) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._lookup(f"{module}.{name}"))

    def _instance(self, arg: object) -> None:
        """Protocol 0's class with its arguments: the name is noted, the opcode refused."""
        self._lookup(str(arg))
        raise PickleError("uses opcode INST, which no checkpoint needs")

    def _lookup(self, name: str) -> Global | Forbidden:
        name = name.replace("__builtin__.", "builtins.", 1)
        self._spend(len(name))
        if name in self._constructors or is_plain_name(name):
            return Global(name)
        if len(self.forbidden) < _MAX_FORBIDDEN:
            self.forbidden[name] = None
        return Forbidden(name)

    def _reduce(self, arg: object) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if not isinstance(args, tuple):
            raise PickleError("calls something with arguments that are not a tuple")
        if isinstance(function, Forbidden):
            self._stack.append(function)
        elif isinstance(function, Global) and function.name in self._constructors:
            self._spend(sum(len(part) for part in args if isinstance(part, str | bytes)) + len(args))
            strange = next((part for part in args if isinstance(part, Forbidden)), None)
            # A dict with a strange factory is a dict; anything else made of a strange object is as strange.
            usable = strange is None or function.name.startswith("collections.")
            self._stack.append(self._constructors[function.name](args) if usable else strange)
        else:
            raise PickleError(f"calls {function.name if isinstance(function, Global) else type(function).__name__}")

    def _build(self, arg: object) -> None:
        state = self._stack.pop()
        match self._stack[-1], state:
            case ((Namespace(values=values) | Module(attributes=values)), dict()):
                self._spend(len(state))
                values.update(state)
            case Record(values=values), dict():
                self._spend(len(state))
                values.update(state)
            case Record(values=values), tuple():
                values["state"] = state
            case NumpyDtype() as dtype, (_, "<" | ">" | "|" as order, *_):
                dtype.order = order
            case _, Forbidden():
                self._stack[-1] = state  # an object with a strange state is as strange
            case dict(), _:
                pass  # attributes of an OrderedDict, such as a state dict's _metadata
            case Forbidden(), _:
                pass
            case target, _:
                raise PickleError(f"sets the state of a {type(target).__name__}")

    def _persistent(self, arg: object) -> None:
        match self._stack.pop():
            case ("storage", Global(name=kind), str(key), _, int(numel), *view) if numel >= 0 and not any(view):
                storage = Storage(kind.rpartition(".")[2], key, numel)
                if storage.kind not in ITEM_SIZES or self.storages.setdefault(key, storage) != storage:
                    raise PickleError(f"describes storage {key} in two ways, or as a {storage.kind}")
                self._stack.append(storage)
            case ("module", Forbidden() | Global() as module, *_):  # the legacy format adds the module's source code
                self._stack.append(module)
            case _:
                raise PickleError("refers to a storage in a way PyTorch 0.4 and later do not write")


_IGNORED = {"PROTO", "FRAME", "STOP"}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
# Bytes of the length that stands before a string.
_LENGTHS = {"BINUNICODE": 4, "BINUNICODE8": 8, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
_HANDLERS: dict[str, Callable[[PickleMachine, object], None]] = {
    "MARK": PickleMachine._mark,
    "TUPLE": PickleMachine._tuple,
    "TUPLE1": lambda machine, arg: machine._tuple_of(1),
    "TUPLE2": lambda machine, arg: machine._tuple_of(2),
    "TUPLE3": lambda machine, arg: machine._tuple_of(3),
    # Sets become lists and tuples: nothing here needs their elements hashed.
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, arg: machine._stack.append([])),
    "FROZENSET": PickleMachine._tuple,
    "EMPTY_DICT": lambda machine, arg: machine._stack.append({}),
    "APPEND": PickleMachine._append,
    **dict.fromkeys(("APPENDS", "ADDITEMS"), PickleMachine._appends),
    "SETITEM": PickleMachine._setitem,
    "SETITEMS": PickleMachine._setitems,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), PickleMachine._put),
    "MEMOIZE": PickleMachine._memoize,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), PickleMachine._get),
    "GLOBAL": PickleMachine._global,
    "INST": PickleMachine._instance,
    "STACK_GLOBAL": PickleMachine._stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), PickleMachine._reduce),
    "BUILD": PickleMachine._build,
    "BINPERSID": PickleMachine._persistent,
}
_READ = _IGNORED | _CONSTANTS.keys() | _PUSHED | _HANDLERS.keys()
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _tokens(stream: BinaryIO, longest: int | None) -> Iterator[tuple[str, object]]:
    """Yields names and arguments of the opcodes of one pickle; an opcode that is not in use is refused unread.

    Strings of more than `longest` bytes are stepped over, and are a `Blob` each.
    """
    name = ""
    while name != "STOP":
        code = stream.read(1)
        if code not in _OPCODES:
            raise PickleError(f"is damaged (found {code!r} in place of an opcode)" if code else "is truncated")
        opcode = _OPCODES[code]
        name = opcode.name
        if name not in _READ:
            raise PickleError(f"uses opcode {name}, which no checkpoint needs")
        if name in ("GLOBAL", "INST"):  # unlike pickle, pickletools would resolve backslashes in the two names
            module, member = (stream.readline().removesuffix(b"\n").decode("utf-8") for _ in range(2))
            yield name, f"{module}.{member}"
        elif longest is not None and (blob := _blob(stream, name, longest)) is not None:
            yield name, blob
        else:
            yield name, opcode.arg.reader(stream) if opcode.arg else None


def _blob(stream: BinaryIO, name: str, longest: int) -> Blob | None:
    """Steps over the string of an opcode if it is long; else None, and the stream is where it was."""
    if name not in _LENGTHS:
        return None
    start = stream.tell() + _LENGTHS[name]
    nbytes = int.from_bytes(stream.read(_LENGTHS[name]), "little")
    stream.seek(start + nbytes if nbytes > longest else start - _LENGTHS[name])
    return Blob(start, nbytes, text="UNICODE" in name) if nbytes > longest else None
