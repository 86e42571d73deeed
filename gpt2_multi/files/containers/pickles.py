"""Pickles as torch.save writes them, read without running anything.

A small machine for the opcodes that such a pickle has (Lib/pickletools.py documents them). Names of functions and
classes stay names: the few that build a tensor or a dict are known here, and what any other would make is an `Inert`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from gpt2_multi.files.arrays import LONGEST, Shape

STORAGES: Mapping[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class Storage(NamedTuple):
    """Numbers in a row that tensors share: its key in the file, its dtype, and how many there are."""

    key: str
    dtype: np.dtype[Any]
    length: int


class Stored(NamedTuple):
    """A tensor: where it lies in its storage, counted in numbers."""

    storage: Storage
    offset: int
    shape: Shape
    strides: Shape


class Name(NamedTuple):
    """A function or a class that a pickle names."""

    text: str


class Inert:
    """What a function or a class would have made, which is not run: its name, `module name`, and its attributes."""

    def __init__(self, text: str, attributes: Any = None) -> None:
        self.text, self.attributes = text, attributes

    def __repr__(self) -> str:
        return self.text


MARK = Name("mark")


def _is_plain(key: Any) -> bool:
    """Whether a key of a dict is a string or a small number."""
    return isinstance(key, str) or (type(key) is int and key in range(1 << 32))


def _tensor(storage: Storage, offset: int, shape: Shape, strides: Shape, *_: Any) -> Stored:
    tuples = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 8
    if not isinstance(storage, Storage) or not tuples or not all(type(n) is int for n in (offset, *shape, *strides)):
        raise ValueError("it has a tensor that is none")
    return Stored(storage, offset, shape, strides)


def _dict() -> dict[str, Any]:
    return {}


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections OrderedDict": _dict,
    "collections defaultdict": lambda *_: {},
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils _rebuild_parameter_with_state": lambda tensor, *_: tensor,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "INT", "LONG", "FLOAT",
}  # fmt: skip
EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """Runs one pickle over a stack. What torch.save does not write is a ValueError, LookupError or TypeError.

    `size` is that of the file: what a byte of a pickle makes is larger than it, so that a file has room for so many.
    """

    def __init__(self, size: int) -> None:
        self.room = (1 << 16) + size // 32
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}  # all that were named

    def run(self, file: IO[bytes]) -> Any:
        """The value of the pickle that begins here; the file stands behind it then."""
        for opcode, argument, _ in pickletools.genops(file):
            name, self.room = opcode.name, self.room - 1
            if self.room < 0:
                raise ValueError("its pickle is longer than that of any GPT-2")
            if name in VALUES:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name in TUPLES:
                self.stack.append(tuple(self.last(TUPLES[name])))
            elif name != "STOP":
                self.step(name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """One opcode that does more than to push a value."""
        act = getattr(self, f"do_{name.lower()}", None)
        if act is None:
            raise ValueError(f"its pickle does what no checkpoint does ({name}); it may be made to run code")
        act(argument)

    def last(self, count: int) -> list[Any]:
        """Take the last values off the stack."""
        if count > len(self.stack):
            raise ValueError("its pickle takes from an empty stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def marked(self) -> list[Any]:
        """Take all values down to the last mark, and the mark."""
        start = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is MARK), None)
        if start is None:
            raise ValueError("its pickle takes down to a mark that is not there")
        return self.last(len(self.stack) - start)[1:]

    def do_proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"its pickle is of the protocol {version}")

    def do_frame(self, _: Any) -> None:
        """A hint for readers of streams."""

    def do_mark(self, _: Any) -> None:
        self.stack.append(MARK)

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def do_pop(self, _: Any) -> None:
        self.last(1)

    def do_global(self, text: str) -> None:
        self.stack.append(Name(text))

    def do_stack_global(self, _: Any) -> None:
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > LONGEST:
            raise ValueError("its pickle has a name that is none, or longer than any")
        self.stack.append(Name(f"{module} {name}"))

    def do_reduce(self, _: Any) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, Name):
            raise ValueError("its pickle calls what is no name, which is not run")
        call = CALLS.get(function.text)
        if call is not None and (not isinstance(arguments, tuple) or len(arguments) > 8):
            raise ValueError("its pickle calls with what is no list of arguments")
        self.stack.append(Inert(function.text) if call is None else call(*arguments))

    def do_newobj(self, _: Any) -> None:
        made, _arguments = self.last(2)
        if not isinstance(made, Name):
            raise ValueError("its pickle makes an object of what is no class, which is not run")
        self.stack.append(Inert(made.text))

    def do_build(self, _: Any) -> None:
        (state,) = self.last(1)
        if isinstance(self.stack[-1], Inert):  # what else has attributes is a state_dict, with its `_metadata`
            self.stack[-1].attributes = state

    def do_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    do_long_binput = do_binput

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    do_long_binget = do_binget

    def do_append(self, _: Any) -> None:
        self.extend(self.last(1))

    def do_appends(self, _: Any) -> None:
        self.extend(self.marked())

    def extend(self, values: list[Any]) -> None:
        """Put values at the end of the list on top."""
        if not isinstance(self.stack[-1], Inert):
            self.stack[-1].extend(values)

    def do_setitem(self, _: Any) -> None:
        self.put(self.last(2))

    def do_setitems(self, _: Any) -> None:
        self.put(self.marked())

    def put(self, values: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top.

        A key that is a tree of tuples would take for ever, and so would many large numbers that collide: it is a key
        that is like no other.
        """
        keys = [key if _is_plain(key) else Inert(f"a {type(key).__name__}") for key in values[::2]]
        if not isinstance(self.stack[-1], Inert):
            self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def do_binpersid(self, _: Any) -> None:
        (identity,) = self.last(1)
        kind, storage, key, _, length = identity[:5]
        dtype = STORAGES.get(storage.text.removeprefix("torch ")) if isinstance(storage, Name) else None
        sound = type(key) is str and len(key) <= LONGEST and type(length) is int and length >= 0
        if kind != "storage" or dtype is None or not sound:
            raise ValueError(f"it has a storage of {getattr(storage, 'text', 'no type')}, which no weight has")
        self.stack.append(self.storages.setdefault(key, Storage(key, dtype, length)))
