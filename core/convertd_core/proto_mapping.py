"""Between protobuf messages and our values, field by field, by name: one mapper each way.

A value's field and the message's field have the same name. What has another form on our side:

    enum            a StrEnum whose members are named as the contract's, without the prefix
    Timestamp       an aware datetime
    repeated, map   a tuple or a frozenset; a dict
    unset message   None, where the field may be None

A field that only the value has, with a default, keeps that default. A field that only the message
has is left alone: so a passphrase never gets into a value.

Nothing of protobuf is imported: a message describes itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T")

UNSPECIFIED: Final = "UNSPECIFIED"

Unknown = Callable[[str, int], Exception]
"""Makes the error for a number of an enum that has no name here, of the field at this path."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """One field of a value: its name, its type without None, and its default."""

    name: str
    kind: Any
    is_optional: bool
    default: object


def from_message(kind: type[T], message: Any, unknown: Unknown | None = None, path: str = "") -> T:
    """Make a value of a message.

    A field that is not set, or has protobuf's zero, has the value's default, if there is one. One
    that may be None, and is not set, is None.
    A number of an enum that has no name here becomes UNSPECIFIED: a newer peer sent it. With
    `unknown`, it is an error, as is in a request what can't be done.

    Raises:
        Exception: what `unknown` made.
    """
    found: dict[str, object] = {}
    for field in fields_of(typing.cast("Any", kind)):
        described = message.DESCRIPTOR.fields_by_name.get(field.name)
        if described is None or _is_left_out(message, described, field):
            if field.is_optional and field.default is dataclasses.MISSING:
                found[field.name] = None
            continue
        inside = f"{path}.{field.name}" if path else field.name
        found[field.name] = _value(
            field.kind, getattr(message, field.name), described, unknown, inside
        )
    return kind(**found)


def to_message(value: object, message: Any) -> Any:
    """Fill a message from a value, and give it back; None, and what it has no field for, is not."""
    for field in fields_of(typing.cast("Any", type(value))):
        described = message.DESCRIPTOR.fields_by_name.get(field.name)
        item = getattr(value, field.name)
        if described is not None and item is not None:
            _put(message, described, item)
    return message


@functools.cache
def fields_of(kind: Any) -> tuple[_Field, ...]:
    """The fields of a dataclass, their types understood once."""
    hints = typing.get_type_hints(kind)
    fields = []
    for item in dataclasses.fields(kind):
        hint, is_optional = hints[item.name], False
        if typing.get_origin(hint) is types.UnionType:
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
            is_optional = True
        fields.append(
            _Field(name=item.name, kind=hint, is_optional=is_optional, default=item.default)
        )
    return tuple(fields)


def _is_left_out(message: Any, described: Any, field: _Field) -> bool:
    if field.default is dataclasses.MISSING and not field.is_optional:
        return False
    if described.has_presence:
        return not message.HasField(field.name)
    return not getattr(message, field.name)


def _value(kind: Any, item: Any, described: Any, unknown: Unknown | None, path: str) -> object:
    """One field of a message in our form."""
    origin = typing.get_origin(kind)
    if origin in {tuple, frozenset}:
        inner = typing.get_args(kind)[0]
        return origin(_single(inner, each, described, unknown, path) for each in item)
    if origin is not None and issubclass(origin, Mapping):
        return dict(item)
    return _single(kind, item, described, unknown, path)


def _single(kind: Any, item: Any, described: Any, unknown: Unknown | None, path: str) -> object:
    if described.enum_type is not None:
        return _member(kind, item, described.enum_type, unknown, path)
    if kind is datetime.datetime:
        return item.ToDatetime(tzinfo=datetime.UTC)
    if dataclasses.is_dataclass(kind):
        return from_message(typing.cast("type[Any]", kind), item, unknown, path)
    return item


def _member(
    kind: type[enum.StrEnum], number: int, described: Any, unknown: Unknown | None, path: str
) -> enum.StrEnum:
    named = described.values_by_number.get(number)
    name = named.name.removeprefix(prefix_of(described)) if named is not None else ""
    if name in kind.__members__ and not (unknown and name == UNSPECIFIED):
        return kind[name]
    if unknown is not None:
        raise unknown(path, number)
    return kind[UNSPECIFIED]


def number_of(member: enum.StrEnum, described: Any) -> Any:
    """The number that the contract gives a member of an enum."""
    return described.values_by_name[prefix_of(described) + member.name].number


def prefix_of(described: Any) -> str:
    """What all names of an enum begin with. Its first is UNSPECIFIED, as buf demands."""
    return str(described.values[0].name).removesuffix(UNSPECIFIED)


def _put(message: Any, described: Any, item: Any) -> None:
    name = described.name
    target = getattr(message, name)
    if isinstance(item, tuple | frozenset):
        for each in item if isinstance(item, tuple) else sorted(item):
            if described.message_type is not None:
                to_message(each, target.add())
            else:
                target.append(_plain(each, described))
    elif isinstance(item, Mapping):
        target.update(item)
    elif isinstance(item, datetime.datetime):
        target.FromDatetime(item)
    elif described.message_type is not None:
        target.SetInParent()
        to_message(item, target)
    else:
        setattr(message, name, _plain(item, described))


def _plain(item: Any, described: Any) -> Any:
    return number_of(item, described.enum_type) if described.enum_type is not None else item
