"""Frozen dataclasses to bytes and back, strictly, with the standard library alone.

The broker reads such bytes from a process that may have been taken over, as root. So there is one
decoder, it is small, it builds nothing but the types it was told to expect, and anything that does
not fit exactly is a `CodecError`. JSON, because its parser comes with the interpreter and a message
can be read in a trace. The job may import only the standard library, which rules out msgspec.

What a field may be: str, int, float, bool, None, an enum of strings, a datetime with its zone, a
mapping of texts to texts, a tuple or frozenset of such, a dataclass of such, one of these and None,
or one of several dataclasses. A message, and a field that may be one of several dataclasses, is
`[class name, {field: value}]`. UNSPECIFIED, of any enum, is no value.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T")

Decoder = Callable[[Any], Any]


class CodecError(ValueError):
    """Bytes that are not one of the messages expected."""


def encode(message: object) -> bytes:
    """Put a dataclass into bytes.

    Raises:
        CodecError: a text in it is not valid Unicode (a lone surrogate).
    """
    try:
        return json.dumps(_tagged(message), ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CodecError(str(error)) from error


def decode(data: bytes, *kinds: type[T]) -> T:
    """Make the one of `kinds` that the bytes name.

    Raises:
        CodecError: the bytes are no JSON, name another class, lack a field, have one too many, or
            hold a value of another type.
    """
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodecError(str(error)) from error
    return typing.cast("T", _untagged(parsed, kinds))


def _tagged(value: object) -> list[object]:
    return [type(value).__name__, _plain(value)]


def _untagged(parsed: Any, kinds: tuple[Any, ...]) -> Any:
    """Make the one of `kinds` that parsed JSON names."""
    match parsed:
        case [str(name), dict(fields)]:
            for kind in kinds:
                if kind.__name__ == name:
                    return decoder_of(kind)(fields)
    raise CodecError("not one of the messages expected here")


def _plain(value: object) -> object:
    """What json can write: dataclasses as objects, sets and tuples as arrays."""
    if type(value) in _WRITTEN_AS_THEY_ARE:
        return value
    if isinstance(value, tuple | frozenset):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {name: writer(getattr(value, name)) for name, writer in _writers_of(value.__class__)}
    return value.isoformat() if isinstance(value, datetime.datetime) else value


_WRITTEN_AS_THEY_ARE: Final = frozenset({str, int, float, bool, types.NoneType})


@functools.cache
def _writers_of(kind: Any) -> tuple[tuple[str, Callable[[Any], object]], ...]:
    """The names of a dataclass's fields, and what makes their JSON."""
    hints = typing.get_type_hints(kind)
    return tuple(
        (item.name, _tagged if _is_choice(hints[item.name]) else _plain)
        for item in dataclasses.fields(kind)
    )


def _is_choice(kind: Any) -> bool:
    """Whether a field's type is one of several dataclasses."""
    return typing.get_origin(kind) is types.UnionType and all(
        dataclasses.is_dataclass(item) for item in typing.get_args(kind)
    )


def decoder_of(kind: Any) -> Decoder:
    """The function that makes a `kind` from parsed JSON, or raises CodecError. Made once a kind.

    Raises:
        TypeError: a field of a type that is not listed in this module's docstring: our bug.
    """
    if kind not in _made:
        _made[kind] = _make_decoder(kind)
    return _made[kind]


_made: dict[Any, Decoder] = {}


def _make_decoder(kind: Any) -> Decoder:
    origin = typing.get_origin(kind)
    if _is_choice(kind):
        kinds = typing.get_args(kind)
        for item in kinds:
            decoder_of(item)  # made here once, and not during a request
        return lambda value: _untagged(value, kinds)
    if origin is types.UnionType:
        return _optional(kind)
    if origin in {tuple, frozenset}:
        return _sequence(kind, origin)
    if dataclasses.is_dataclass(kind):
        return _fields(kind)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        return _enum(kind)
    if kind not in _OTHERS:
        raise TypeError(kind)
    return _OTHERS[kind]


def _scalar(kind: Any) -> Decoder:
    # True is an int to isinstance(), and 1 a fine float: hence the exact types.
    accepted = {int, float} if kind is float else {kind}

    def decode_scalar(value: Any) -> Any:
        if type(value) not in accepted:
            raise CodecError(f"expected {kind.__name__}, found {type(value).__name__}")
        # JSON can escape a lone surrogate, which can't be encoded as UTF-8, as the journal needs.
        if kind is str and not _is_unicode(value):
            raise CodecError("a text that is not Unicode")
        return value

    return decode_scalar


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _enum(kind: type[enum.StrEnum]) -> Decoder:
    def decode_enum(value: Any) -> Any:
        try:
            member = kind(value)
        except ValueError as error:
            raise CodecError(str(error)) from error
        if member.name == "UNSPECIFIED":
            raise CodecError(f"expected a {kind.__name__} that is one")
        return member

    return decode_enum


def _time(value: Any) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise CodecError(str(error)) from error
    if time.tzinfo is None:
        raise CodecError("expected a time with its zone")
    return time


def _texts(value: Any) -> dict[str, str]:
    text = decoder_of(str)
    if not isinstance(value, dict):
        raise CodecError("expected an object")
    return {text(name): text(item) for name, item in value.items()}


_OTHERS: Final[Mapping[Any, Decoder]] = {
    **{kind: _scalar(kind) for kind in (str, int, float, bool)},
    datetime.datetime: _time,
    Mapping[str, str]: _texts,
}


def _optional(kind: Any) -> Decoder:
    (inner,) = (decoder_of(item) for item in typing.get_args(kind) if item is not types.NoneType)

    def decode_optional(value: Any) -> Any:
        return None if value is None else inner(value)

    return decode_optional


def _sequence(kind: Any, origin: Any) -> Decoder:
    match typing.get_args(kind):
        case (item,) | (item, types.EllipsisType()):
            every, count = decoder_of(item), None
        case items:
            # A tuple of a fixed shape; all of ours have one type throughout.
            (item,) = set(items)
            every, count = decoder_of(item), len(items)

    def decode_sequence(value: Any) -> Any:
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise CodecError("expected an array of another shape")
        return origin(every(item) for item in value)

    return decode_sequence


def _fields(kind: Any) -> Decoder:
    hints = typing.get_type_hints(kind)
    decoders = {item.name: decoder_of(hints[item.name]) for item in dataclasses.fields(kind)}

    def decode_fields(value: Any) -> Any:
        if not isinstance(value, dict) or value.keys() != decoders.keys():
            raise CodecError(f"expected exactly the fields of {kind.__name__}")
        return kind(**{name: decoders[name](item) for name, item in value.items()})

    return decode_fields
