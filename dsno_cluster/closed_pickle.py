"""A reader of pickles that makes plain data and runs nothing.

A pickle is a program, and pickle's own reader calls whatever it names. This reader knows only the instructions that data
needs. What a file names is looked up in the caller's table of `Known` globals, and never imported; a call of a known one
goes to a function of ours, which makes data of its arguments. Everything else is refused by name.

The result is made of None, bool, int, float, str, tuple, list, dict, set, memoryview (for bytes: a view of the file) and
what the table's functions return. Keys are never containers, whose hash could take for ever. A structure may contain
itself or share its parts; who walks it must bound the walk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dsno_cluster.weight_files import NotWeights

MAX_INSTRUCTIONS = 1_000_000  # public checkpoints have below 100,000; each makes at most one small object
MAX_INT_BYTES = 16  # of torch's magic number, the longest of a checkpoint, there are 10
_KEYS = (str, int, float, bool, type(None))


class Malformed(Exception):
    """What is wrong with a pickle, as the end of a sentence that begins with the file. Caught by `read_pickle`."""


@dataclass(frozen=True)
class Known:
    """A global that a file may name: `call` makes data of a call's arguments; None: it is never called.

    `call` raises Malformed for arguments that no checkpoint has.
    """

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None


@runtime_checkable
class Stateful(Protocol):
    """Data to which a file may give a state after it has been made."""

    def take_state(self, state: Any) -> None:
        """Raises Malformed for a state that no checkpoint has."""
        ...


def read_pickle(
    data: memoryview,
    where: str,
    known: Mapping[tuple[str, str], Known],
    *,
    start: int = 0,
    persistent: Callable[[Any], Any] | None = None,
    limit: int = MAX_INSTRUCTIONS,
) -> tuple[Any, int]:
    """The value of the pickle that begins at `start` of `data`, and the position after its end.

    `known` has globals by (module, name); `persistent` turns a persistent id into data, None: there are none; `limit` is
    the greatest number of instructions. Raises NotWeights, in one line that begins with `where`.
    """
    machine = _Machine(data, start, known, persistent)
    try:
        return machine.run(limit), machine.at
    except Malformed as error:
        raise NotWeights(f"{where}: {error}") from None


def damaged() -> Malformed:
    """The error for contents that no writer makes."""
    return Malformed("is a damaged pickle")


def shown(name: str) -> str:
    """A name from a file, in one line and not too long."""
    return name[:80] if name.isprintable() and " " not in name else repr(name[:80])


class _Machine:
    """The state of reading: a stack, the stacks below its marks, and the memo."""

    def __init__(
        self,
        data: memoryview,
        at: int,
        known: Mapping[tuple[str, str], Known],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.data, self.at, self.known, self.persistent = data, at, known, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, limit: int) -> Any:
        for _ in range(limit):
            code = self.take(1)[0]
            if code == _STOP:
                value = self.pop()
                if self.stack or self.below:
                    raise damaged()
                return value
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise Malformed(_refused(code))
            instruction(self)
        raise Malformed(f"has more than {limit:,} pickle instructions; no checkpoint has")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes of the file."""
        if count > len(self.data) - self.at:
            raise Malformed("is cut off or damaged: it ends within its data")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number, as `struct` packs it."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, data: memoryview) -> str:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise damaged() from None

    def line(self) -> str:
        """The text up to the next end of a line, which must be near."""
        end = bytes(self.data[self.at : self.at + 1024]).find(b"\n")
        if end < 0:
            raise damaged()
        return self.text(self.take(end + 1)[:end])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise damaged()
        return self.stack.pop()

    def last(self, kind: type) -> Any:
        """The value on top of the stack, which must be a `kind`."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise damaged()
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise damaged()
        values, self.stack = self.stack, self.below.pop()
        return values

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def put(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise damaged()
        self.push(self.memo[index])

    def append(self, values: list[Any]) -> None:
        self.last(list).extend(values)

    def add_keys(self, values: list[Any]) -> None:
        if not all(type(value) in _KEYS for value in values):
            raise damaged()
        self.last(set).update(values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2 or not all(type(key) in _KEYS for key in values[::2]):
            raise damaged()
        self.last(dict).update(zip(values[::2], values[1::2], strict=True))

    def pair(self) -> list[Any]:
        value, key = self.pop(), self.pop()
        return [key, value]

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise damaged()
        found = self.known.get((module, name))
        if found is None:
            raise Malformed(
                f"names {shown(f'{module}.{name}')}, which could run code and is in no checkpoint of this kind"
            )
        self.push(found)

    def name_of_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or not isinstance(function, Known):
            raise Malformed("calls what is not a function: it is damaged, or would run code")
        if function.call is None:
            raise Malformed(f"calls {function.name}, which no checkpoint does")
        self.push(function.call(arguments))

    def build(self) -> None:
        state, value = self.pop(), self.pop()
        if not isinstance(value, Stateful):
            raise Malformed(f"gives a state to a {type(value).__name__}, which no checkpoint does")
        value.take_state(state)
        self.push(value)

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Malformed("refers to data outside of it (a persistent id)")
        self.push(self.persistent(self.pop()))

    def protocol(self) -> None:
        if self.take(1)[0] > 5:
            raise damaged()

    def frame(self) -> None:
        if self.number("<Q") > len(self.data) - self.at:
            raise Malformed("is cut off or damaged: it ends within its data")

    def integer(self) -> None:
        size = self.take(1)[0]
        if size > MAX_INT_BYTES:
            raise damaged()
        self.push(int.from_bytes(self.take(size), "little", signed=True))


_STOP = ord(".")
# The instructions that writers of checkpoints use, in protocols 2 to 5.
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: _Machine.integer,
    ord("G"): lambda m: m.push(m.number(">d")),
    0x8C: lambda m: m.push(m.text(m.take(m.number("<B")))),
    ord("X"): lambda m: m.push(m.text(m.take(m.number("<I")))),
    0x8D: lambda m: m.push(m.text(m.take(m.number("<Q")))),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # of a bytearray
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.set_items(m.pair()),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    0x8F: lambda m: m.push(set()),
    0x90: lambda m: m.add_keys(m.since_mark()),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _Machine.name_of_stack,
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # NEWOBJ, which calls a class; here it is the same
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}


def _refused(code: int) -> str:
    """Why an instruction is not followed."""
    import pickletools

    known = next((op.name for op in pickletools.opcodes if ord(op.code) == code), None)
    if known is None:
        return f"is a damaged pickle: byte {code} is no instruction"
    return f"has the pickle instruction {known}, which no checkpoint of this kind has"
