"""What a pickle says, found out without running it.

A pickle is a program: it can call functions, and ask for any amount of memory in a few bytes. Here
its steps only make plain values, and a call becomes a record of what would be called. So no pickle
does anything, and its values take no more memory than its length allows.
"""

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Enough for a hundred thousand tensors. A megabyte can become two hundred in memory.
MAX_BYTES = 1 << 24

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# The steps that put their argument on the stack.
_ARGUMENTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ORDERED_DICT = "collections.OrderedDict"


class UnknownName(Exception):
    """A pickle names something that it should not; the argument is the name."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names, as in "torch.FloatStorage"; it is not imported."""

    text: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call that a pickle asks for, and that was not made."""

    function: Name
    args: tuple


def read_pickle(
    file: io.BytesIO, known: Callable[[str], bool], persistent: Callable[[Any], Any]
) -> Any:
    """The value of the pickle that begins where the file stands; the file then stands after it.

    A file in memory, since others allocate as much as a damaged length asks for.

    Tuples, lists, dictionaries, ordered dictionaries, numbers, text and bytes are themselves; of an
    ordered dictionary's attributes `_metadata` is kept.
    known: whether a name is one that the pickle may have. persistent: gives the value of a
    persistent id. Raises UnknownName, and other exceptions of any kind for a damaged pickle and
    for one with other steps than those of state dicts.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def marked() -> list[Any]:
        place = marks.pop()
        values = stack[place:]
        del stack[place:]
        return values

    for step, argument, _ in pickletools.genops(file):
        match step.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "GLOBAL":
                stack.append(_name(str(argument).replace(" ", "."), known))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(_name(f"{stack.pop()}.{name}", known))
            case "TUPLE" | "LIST" | "DICT":
                stack.append(_collected(step.name, marked()))
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                values = marked()
                _extend(stack[-1], values)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _ARGUMENTS:
                stack.append(argument)
            case name:
                _step(name, stack)
    raise ValueError("a pickle without an end")


def _step(name: str, stack: list[Any]) -> None:
    """A step that takes its operands from the end of the stack."""
    match name:
        case "EMPTY_LIST" | "EMPTY_SET":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        case "APPEND":
            value = stack.pop()
            _extend(stack[-1], [value])
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            _extend(stack[-1], [key, value])
        case "REDUCE" | "NEWOBJ":
            args, function = stack.pop(), stack.pop()
            stack.append(_call(function, args))
        case "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], OrderedDict) and isinstance(state, dict):
                stack[-1]._metadata = state.get("_metadata")  # type: ignore[attr-defined]
        case _:
            raise ValueError(f"a step {name}")


def _name(text: str, known: Callable[[str], bool]) -> Name:
    if not known(text):
        raise UnknownName(text)
    return Name(text)


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(args, tuple):
        raise ValueError("a call of something without a name")
    if function.text != _ORDERED_DICT:
        return Call(function, args)
    # Python 2 wrote the entries as an argument.
    return OrderedDict(_pairs([part for pair in args[0] for part in pair] if args else []))


def _collected(kind: str, values: list[Any]) -> Any:
    if kind == "DICT":
        return dict(_pairs(values))
    return tuple(values) if kind == "TUPLE" else values


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, dict):
        target.update(_pairs(values))
    elif isinstance(target, list):
        target.extend(values)
    # Entries of what is not made are nobody's.


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in zip(values[::2], values[1::2], strict=True):
        # The hash of a deeply nested tuple would overflow the processor's stack.
        if not isinstance(key, str | bytes | int | float | None):
            raise ValueError("a key that is neither text nor a number")
        yield key, value
