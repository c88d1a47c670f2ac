"""Reading a pickle without what makes one dangerous: no class is looked up, no function called, no code run.

What it takes grows with the size of the pickle, and is bounded. A `pickle.Unpickler` with a `find_class` of its own
runs no code either, but a pickle of a few bytes has it make room for a memo of gigabytes.
"""

import pickletools
from collections.abc import Iterator
from typing import Any

# Of a model of 70 billion parameters on 64 processes, what FSDP lists has 12 million bytes and 2 million operations.
MAX_BYTES = 64 * 2**20
MAX_OPERATIONS = 5_000_000

# Operations that push the value which is written after them; LONG4, for whole numbers of any length, is not among them
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Operations that put what they pop into a new container: so many values, or those above the mark
CONTAINERS = {
    "EMPTY_TUPLE": 0,
    "EMPTY_LIST": 0,
    "EMPTY_DICT": 0,
    "EMPTY_SET": 0,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
}
MARKED_CONTAINERS = {"TUPLE", "LIST", "DICT", "FROZENSET"}
# Operations that look up a class, or make an object of one: what they pop is forgotten
OBJECTS = {"GLOBAL": 0, "STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "BINPERSID": 1, "PERSID": 0}
OBJECTS |= {"EXT1": 0, "EXT2": 0, "EXT4": 0}
MARKED_OBJECTS = {"OBJ", "INST"}
# Operations that put what they pop into the container or the object below
ADDITIONS = {"APPEND": 1, "SETITEM": 2}
MARKED_ADDITIONS = {"APPENDS", "SETITEMS", "ADDITEMS"}


class Inert:
    """Stands for what a pickle makes but plain values: a container, or an object of any class.

    Attributes:
        items (`list`): what was put in; of a dict, keys and values by turns.
        state (`Any`): what the object's attributes were set from, mostly the `Inert` of a dict.
    """

    __slots__ = ("_by_name", "items", "state")

    def __init__(self, items: list[Any]):
        self.items, self.state = items, None
        self._by_name: dict[str, Any] | None = None

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Return the keys and values of a dict."""
        return zip(self.items[::2], self.items[1::2], strict=True)

    @property
    def by_name(self) -> dict[str, Any]:
        """Return the values of a dict whose keys are strings."""
        if self._by_name is None:  # found once, or many objects of one large state would take long
            self._by_name = {key: value for key, value in self.pairs() if isinstance(key, str)}
        return self._by_name

    def attribute(self, name: str) -> Any:
        """Return an attribute of an object.

        Raises:
            ValueError: if it was not saved.
        """
        if not isinstance(self.state, Inert) or name not in self.state.by_name:
            raise ValueError(f"a pickled object has no {name}")
        return self.state.by_name[name]


def read_inert(pickled: bytes) -> Any:
    """Read a pickle.

    Args:
        pickled (`bytes`): the pickle.

    Returns:
        A number, string, bytes, bool or None as it was saved, anything else as an `Inert`.

    Raises:
        ValueError: if it is no pickle, or has what no checkpoint needs.
    """
    machine = Machine()
    for count, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        if count == MAX_OPERATIONS:
            raise ValueError(f"a pickle has more than {MAX_OPERATIONS} operations")
        if operation.name == "STOP":
            return machine.stack[-1]
        if not (machine.build(operation.name, argument) or machine.move(operation.name, argument)):
            raise ValueError(f"a pickle has the operation {operation.name}, which no checkpoint needs")
    raise ValueError("a pickle has no end")


class Machine:
    """The stack, the marks and the memo on which the operations of a pickle work."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Any] = {}

    def pop(self, count: int) -> list[Any]:
        """Take values off the stack, but none from before the last mark."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("a pickle takes what it did not give")
        return self.pop_from(start)

    def pop_to_mark(self) -> list[Any]:
        """Take all values since the last mark off the stack."""
        return self.pop_from(self.marks.pop())

    def pop_from(self, start: int) -> list[Any]:
        """Take all values from an index on off the stack."""
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

    def build(self, name: str, argument: Any) -> bool:
        """Run an operation that makes a value or fills one. Return whether it is one of these."""
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            stack.append(Inert(self.pop(CONTAINERS[name])))
        elif name in MARKED_CONTAINERS:
            stack.append(Inert(self.pop_to_mark()))
        elif name in OBJECTS:
            self.pop(OBJECTS[name])
            stack.append(Inert([]))
        elif name in MARKED_OBJECTS:
            self.pop_to_mark()
            stack.append(Inert([]))
        elif name in ADDITIONS:
            added = self.pop(ADDITIONS[name])
            stack[-1].items.extend(added)
        elif name in MARKED_ADDITIONS:
            added = self.pop_to_mark()
            stack[-1].items.extend(added)
        elif name == "BUILD":
            (state,) = self.pop(1)
            stack[-1].state = state
        else:
            return False
        return True

    def move(self, name: str, argument: Any) -> bool:
        """Run an operation that moves values, or does nothing. Return whether it is one of these."""
        stack, memo = self.stack, self.memo
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "POP":
            self.pop(1)
        elif name == "POP_MARK":
            self.pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            return name in ("PROTO", "FRAME")
        return True
