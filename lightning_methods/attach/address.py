r"""Addresses: strings that name a value in a training step.

Grammar (EBNF)::

    address = value | capture ;
    value   = ( "batch" | "output" ) , { "." , name } ;
    capture = ( "module" | "teacher" ) , { "." , name } ,     (* path of submodules, or to a Parameter *)
              [ "@input" ] ,                                  (* what it received, not what it returned *)
              [ "#" , index ] ,                               (* which of several calls; default the last *)
              [ ":" , name , { "." , name } ] ;               (* an item of the value *)
    index   = [ "-" ] , digit , { digit } ;
    name    = character , { character } ;
    character = any but ". : @ # \" | "\" , any ;             (* a backslash takes the next one literally *)

`name` is a key of a mapping, an index of a sequence (negative too) or an attribute, tried in that order
as the value's type allows. This module is pure: it knows neither torch modules nor Lightning.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from torch import Tensor

Root: TypeAlias = Literal["batch", "output", "module", "teacher"]
ROOTS: tuple[Root, ...] = ("batch", "output", "module", "teacher")


class AddressError(ValueError):
    """An address that does not parse, or that names nothing in this step."""


@dataclass(frozen=True)
class Address:
    """A parsed address.

    Attributes:
        root: Where the value comes from.
        path: Submodule names, for the roots `module` and `teacher`.
        items: Keys, indices or attributes inside the value.
        received: Whether the value is what the submodule received instead of what it returned.
        call: Which of several calls in one step (None: the last, with a warning if there were more).
    """

    root: Root
    path: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    received: bool = False
    call: int | None = None

    def __str__(self) -> str:
        text = ".".join([self.root, *map(_escape, self.path)])
        text += "@input" if self.received else ""
        text += "" if self.call is None else f"#{self.call}"
        if not self.items:
            return text
        return text + (":" if self.captured else ".") + ".".join(map(_escape, self.items))

    def __repr__(self) -> str:
        return repr(str(self))

    @property
    def captured(self) -> bool:
        """Whether reading it takes a hook on a submodule (or a walk to a Parameter)."""
        return self.root in ("module", "teacher")


@dataclass(frozen=True)
class Computed:
    """A value computed from the step by the user's own function.

    Attributes:
        read: `(step) -> value`.
        write: `(step, value) -> batch`, returns the new batch; None where the address is only read.
        captures: Addresses of submodules that `read` uses, so that they are recorded.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any] | None = None
    captures: tuple[Address, ...] = ()

    def __str__(self) -> str:
        return getattr(self.read, "__qualname__", repr(self.read))

    def __repr__(self) -> str:
        return f"<{self}>"


AnyAddress: TypeAlias = Address | Computed
#: What a method's constructor accepts: a string, a function of the step, or a (get, set) pair.
AddressLike: TypeAlias = (
    str | Address | Computed | Callable[[Any], Any] | tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]
)


def address(value: AddressLike) -> AnyAddress:
    """Parses an address once; raises where the string is read, not in the middle of training.

    >>> address("module.backbone@input#0:0")
    'module.backbone@input#0:0'
    >>> address("btch.image")
    Traceback (most recent call last):
    ...
    lightning_methods.attach.address.AddressError: Address 'btch.image' begins with 'btch', but an address \
begins with one of batch, output, module, teacher. Did you mean 'batch'?
    """
    if isinstance(value, str):
        return _parse(value)
    if isinstance(value, (Address, Computed)):
        return value
    if isinstance(value, tuple) and len(value) == 2 and all(map(callable, value)):
        return Computed(read=value[0], write=value[1])
    if callable(value):
        return Computed(read=value)
    raise AddressError(
        f"An address is a string such as 'batch.0' or 'module.head', a function of the step, or a "
        f"(get, set) pair of functions, but got {describe(value)}."
    )


def computed(read: Callable[[Any], Any], *captures: str) -> Computed:
    """A function of the step that reads submodules: they must be named so that they are recorded.

    >>> computed(lambda step: step["module.a"] + step["module.b"], "module.a", "module.b").captures
    ('module.a', 'module.b')
    """
    return Computed(read, captures=tuple(_parse(text) for text in captures))


def flat(addresses: Iterable[AnyAddress]) -> list[Address]:
    """The parsed addresses among `addresses`, those that functions capture included."""
    return [inner for where in addresses for inner in (where.captures if isinstance(where, Computed) else (where,))]


_NAME = r"(?:[^.:@#\\]|\\.)+"
_CAPTURE = re.compile(rf"({_NAME})((?:\.{_NAME})*)(@input)?(?:#(-?\d+))?(?::({_NAME}(?:\.{_NAME})*))?", re.DOTALL)


@functools.cache
def _parse(text: str) -> Address:
    match = _CAPTURE.fullmatch(text)
    if match is None:
        raise AddressError(
            f"Address {text!r} does not parse. Expected batch.KEY, output.KEY, or "
            f"module.PATH[@input][#CALL][:KEY]; put a backslash before . : @ # or \\ inside a name."
        )
    root, path, received, call, items = match.groups()
    if root not in ROOTS:
        raise AddressError(
            f"Address {text!r} begins with {root!r}, but an address begins with one of {', '.join(ROOTS)}."
            f"{nearest(root, ROOTS)}"
        )
    if root in ("module", "teacher"):
        return Address(
            cast(Root, root),
            _split(path),
            _split(items or ""),
            received is not None,
            None if call is None else int(call),
        )
    if received or call or items:
        raise AddressError(
            f"Address {text!r}: '@input', '#' and ':' belong to 'module' and 'teacher' addresses; "
            f"inside {root!r} every step is written with a dot."
        )
    return Address(cast(Root, root), items=_split(path))


def _split(text: str) -> tuple[str, ...]:
    return tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in re.findall(_NAME, text, re.DOTALL))


def _escape(name: str) -> str:
    return re.sub(r"([.:@#\\])", r"\\\1", name)


def read_items(value: Any, where: Address, found: str) -> Any:
    """Follows `where.items` inside `value`; `found` names the value itself in errors."""
    for name in where.items:
        try:
            value = _item(value, name)
        except LookupError:
            names = _names(value)
            known = f" It has {_listed(names)}." if names else ""
            raise AddressError(
                f"Address '{where}': {found} is {describe(value)}, which has no {name!r}.{known}{nearest(name, names)}"
            ) from None
        found = f"{found}{':' if where.captured and ':' not in found else '.'}{name}"
    return value


def write_items(value: Any, items: Sequence[str], new: Any, where: Address, found: str) -> Any:
    """A copy of `value` with `new` at `items`; containers on the way are rebuilt, never mutated."""
    if not items:
        return new
    name = items[0]
    inner = read_items(value, dataclasses.replace(where, items=(name,)), found)
    inner = write_items(inner, items[1:], new, where, f"{found}.{name}")
    if isinstance(value, Mapping):
        return with_key(value, _key(value, name), inner)
    fields = getattr(value, "_fields", ())
    if isinstance(value, tuple) and (_is_index(name) or name in fields):
        parts: Any = list(value)
        parts[fields.index(name) if name in fields else int(name)] = inner
        # A NamedTuple's constructor takes its fields one by one.
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    rebuilt = _copied(value)
    if isinstance(value, MutableSequence) and _is_index(name):
        rebuilt[int(name)] = inner
        return rebuilt
    try:
        _set_attribute(rebuilt, name, inner)
    except AttributeError:
        raise AddressError(f"Address '{where}': {found} is {describe(value)}, whose {name!r} cannot be set.") from None
    return rebuilt


def _set_attribute(value: Any, name: str, new: Any) -> None:
    try:
        setattr(value, name, new)
    except AttributeError:
        object.__setattr__(value, name, new)  # reaches frozen dataclasses


def with_key(mapping: Mapping[Any, Any], key: Any, new: Any) -> Any:
    """A copy of `mapping`, of its own type where that can be written, with `key` set."""
    rebuilt = _copied(mapping) if isinstance(mapping, MutableMapping) else dict(mapping)
    rebuilt[key] = new
    return rebuilt


def _copied(value: Any) -> Any:
    """A shallow copy that can be written to: a dict or list in which a class keeps its items is copied with it."""
    rebuilt = copy.copy(value)
    if not isinstance(value, dict) and not hasattr(type(value), "__copy__"):
        own = getattr(rebuilt, "__dict__", {})
        own.update({name: copy.copy(part) for name, part in own.items() if isinstance(part, (dict, list))})
    return rebuilt


def _item(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        raise LookupError  # an index into a tensor is a row, hardly ever what was meant
    if isinstance(value, Mapping):
        key = _key(value, name)
        if key not in value:  # asked first: a defaultdict would make the key
            raise LookupError
        return value[key]
    if isinstance(value, Sequence) and not isinstance(value, str) and _is_index(name):
        return value[int(name)]
    try:
        return getattr(value, name)
    except AttributeError:
        raise LookupError from None


def _key(mapping: Mapping[Any, Any], name: str) -> Any:
    if name in mapping or not _is_index(name):
        return name
    return int(name)


def _is_index(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _names(value: Any) -> list[str]:
    if isinstance(value, (Tensor, str)):
        return []
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    if hasattr(value, "_fields"):
        return list(value._fields)
    if isinstance(value, Sequence):
        return [str(index) for index in range(len(value))]
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return [name for name in getattr(value, "__dict__", ()) if not name.startswith("_")]


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """The sentence that proposes the most similar name, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def describe(value: Any) -> str:
    """A short noun phrase for an error message.

    >>> import torch
    >>> describe({"image": torch.zeros(2, 3)})
    'a dict of 1'
    """
    if isinstance(value, Tensor):
        return f"a Tensor of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    kind = type(value).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    if isinstance(value, (Mapping, list, tuple)):
        return f"{article} {kind} of {len(value)}"
    return "None" if value is None else f"{article} {kind}"
