"""Messages as bytes: what goes in comes out, and nothing that was not expected."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
from collections.abc import Mapping
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import codec, conditions, messages, results, values

MESSAGES: tuple[type[Any], ...] = (
    *messages.FROM_FRONT,
    *messages.FROM_BROKER,
    *messages.FROM_JOB,
    messages.LocalRequest,
)
"""Every message that one process sends another."""

# Nobody sends a number that is none, and it would not equal itself.
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(datetime.datetime, st.datetimes(timezones=st.just(datetime.UTC)))
st.register_type_strategy(Mapping, st.dictionaries(st.text(), st.text()))

# Nobody sends what is UNSPECIFIED, either: see below.
for enum_kind in (*vars(values).values(), *vars(results).values()):
    if isinstance(enum_kind, enum.EnumType) and "UNSPECIFIED" in enum_kind.__members__:
        known: tuple[object, ...] = tuple(enum_kind.__members__.values())[1:]
        st.register_type_strategy(enum_kind, st.sampled_from(known))

some_messages = st.one_of([st.from_type(kind) for kind in MESSAGES])


class Colour(enum.StrEnum):
    """For the examples below."""

    UNSPECIFIED = "unspecified"
    RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """For the examples below."""

    number: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    """Has the fields of Inner, and is another."""

    number: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One field of each kind that a message may have."""

    text: str = ""
    count: int = 0
    ratio: float = 0.0
    flag: bool = False
    colour: Colour = Colour.RED
    maybe: Inner | None = None
    either: Inner | Other = dataclasses.field(default_factory=Inner)
    several: tuple[Inner, ...] = ()
    group: frozenset[int] = frozenset()
    pair: tuple[str, str] = ("", "")
    when: datetime.datetime | None = None
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)


def altered(**fields: object) -> bytes:
    """An Example as bytes, with some of its fields' JSON replaced."""
    name, plain = json.loads(codec.encode(Example()))
    return json.dumps([name, plain | fields]).encode()


@given(some_messages)
def test_decoded_message_equals_the_encoded_one(message: object) -> None:
    """For every message, whatever is in it."""
    assert codec.decode(codec.encode(message), *MESSAGES) == message


@pytest.mark.parametrize("kind", [Inner, Other])
def test_union_member_keeps_its_type(kind: type[Inner | Other]) -> None:
    """Though its fields are those of the other."""
    example = Example(either=kind(number=1))
    assert codec.decode(codec.encode(example), Example) == example


def test_text_with_a_lone_surrogate_can_not_be_encoded() -> None:
    """A lone surrogate, as Python makes of bytes that are not UTF-8."""
    with pytest.raises(codec.CodecError, match="surrogates"):
        codec.encode(Example(text="\udcff"))


def test_integer_is_accepted_for_a_float_field() -> None:
    """JSON does not tell 1 from 1.0."""
    assert codec.decode(altered(ratio=1), Example).ratio == 1.0


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half-an-object"),
        pytest.param(b"\xff\xfe\x00", id="no-text"),
        pytest.param(b"[" * 100_000, id="brackets-without-end"),
        pytest.param(b"[" * 50_000 + b"]" * 50_000, id="brackets-in-brackets"),
        pytest.param(b"9" * 10_000, id="a-number-of-ten-thousand-digits"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="an-object"),
        pytest.param(b'["Example"]', id="a-name-alone"),
        pytest.param(b'["Example",{},{}]', id="one-part-too-many"),
        pytest.param(b'["Example",[]]', id="an-array-for-the-fields"),
        pytest.param(b'[["Example"],{}]', id="a-name-that-is-no-text"),
        pytest.param(b'["Inner",{"number":1}]', id="another-class"),
        pytest.param(b'["object",{}]', id="a-class-of-pythons"),
        pytest.param(b'["Example",{}]', id="no-fields"),
        pytest.param(altered(extra=1), id="one-field-too-many"),
        pytest.param(altered(__class__="Inner"), id="a-field-that-python-has"),
        pytest.param(altered(text=1), id="a-number-for-a-text"),
        pytest.param(altered(text=None), id="null-for-a-text"),
        pytest.param(altered(text="\udcff"), id="a-text-that-is-not-unicode"),
        pytest.param(altered(count="1"), id="a-text-for-a-number"),
        pytest.param(altered(count=1.0), id="a-fraction-for-an-integer"),
        pytest.param(altered(count=True), id="true-for-an-integer"),
        pytest.param(altered(ratio=True), id="true-for-a-fraction"),
        pytest.param(altered(ratio="1"), id="a-text-for-a-fraction"),
        pytest.param(altered(flag=1), id="one-for-true"),
        pytest.param(altered(colour="blue"), id="no-such-colour"),
        pytest.param(altered(colour="unspecified"), id="a-colour-that-is-not-said"),
        pytest.param(altered(colour=["red"]), id="a-list-of-colours"),
        pytest.param(altered(colour={"red": 1}), id="an-object-for-a-colour"),
        pytest.param(altered(maybe={}), id="an-inner-message-without-its-field"),
        pytest.param(altered(maybe=["Inner", {"number": 1}]), id="an-inner-message-with-a-name"),
        pytest.param(altered(either=None), id="null-for-one-of-two"),
        pytest.param(altered(either={"number": 1}), id="one-of-two-without-a-name"),
        pytest.param(altered(either=["Example", {}]), id="another-than-the-two"),
        pytest.param(altered(either=["Other", {"number": "1"}]), id="a-wrong-field-in-one-of-two"),
        pytest.param(altered(either=["Other", {}]), id="one-of-two-without-its-field"),
        pytest.param(altered(either=["Other", {"number": 1}, {}]), id="one-of-two-and-more"),
        pytest.param(altered(several={"number": 1}), id="an-object-for-an-array"),
        pytest.param(altered(several=[{"number": "1"}]), id="a-wrong-item"),
        pytest.param(altered(several="ab"), id="a-text-for-an-array"),
        pytest.param(altered(group=[[1]]), id="an-array-in-a-set"),
        pytest.param(altered(pair=["a"]), id="half-a-pair"),
        pytest.param(altered(when="yesterday"), id="no-time"),
        pytest.param(altered(when=1), id="a-number-for-a-time"),
        pytest.param(altered(when="2026-01-01T00:00:00"), id="a-time-of-no-zone"),
        pytest.param(altered(named=[["a", "b"]]), id="an-array-for-a-mapping"),
        pytest.param(altered(named={"a": 1}), id="a-mapping-to-a-number"),
        pytest.param(altered(pair=["a", "b", "c"]), id="a-pair-of-three"),
        pytest.param(altered(pair=["a", 1]), id="a-pair-of-two-kinds"),
    ],
)
def test_message_with_a_wrong_field_is_refused(data: bytes) -> None:
    """With a CodecError, and nothing else."""
    with pytest.raises(codec.CodecError):
        codec.decode(data, Example)


def test_message_of_an_unexpected_type_is_refused() -> None:
    """Though it is one elsewhere: a job can't say what only the broker may."""
    data = codec.encode(messages.Connected(connection=1, uid=1234))
    assert codec.decode(data, *messages.FROM_BROKER) == messages.Connected(connection=1, uid=1234)
    with pytest.raises(codec.CodecError, match="not one of the messages expected"):
        codec.decode(data, *messages.FROM_JOB)


@given(st.binary(max_size=200))
def test_random_bytes_decode_to_a_message_or_are_refused(data: bytes) -> None:
    """Whatever they are, nothing but CodecError is raised."""
    assert is_expected_or_refused(data)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.sampled_from(MESSAGES), anything)
def test_random_json_decodes_to_a_message_or_is_refused(kind: type[Any], fields: object) -> None:
    """Names are known to whoever took the front over; values are up to it."""
    assert is_expected_or_refused(json.dumps([kind.__name__, fields]).encode())


@given(some_messages, st.data())
def test_message_with_a_replaced_value_decodes_to_valid_types_or_is_refused(
    message: object, data: st.DataObject
) -> None:
    """What is built has, in every field at every depth, a value of the field's type."""
    name, fields = json.loads(codec.encode(message))
    if fields:
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(anything)
    assert is_expected_or_refused(json.dumps([name, fields]).encode())


@given(some_messages, st.integers(0, 10_000), st.integers(0, 7))
def test_message_with_a_flipped_bit_decodes_to_a_message_or_is_refused(
    message: object, where: int, bit: int
) -> None:
    """And never something between the two."""
    data = bytearray(codec.encode(message))
    data[where % len(data)] ^= 1 << bit
    assert is_expected_or_refused(bytes(data))


def is_expected_or_refused(data: bytes) -> bool:
    """Whether bytes are refused, or give exactly what the fields' types say."""
    try:
        message = codec.decode(data, *MESSAGES)
    except codec.CodecError:
        return True
    return type(message) in MESSAGES and all_typed(message)


BUILT = (
    *MESSAGES,
    *get_args(messages.RequestBody),
    *get_args(messages.ReplyBody),
    *(kind for kind in (*vars(values).values(), *vars(results).values()) if isinstance(kind, type)),
    datetime.datetime,
    *(messages.Operation, messages.HistogramBucket, conditions.Failure),
)


def all_typed(value: object) -> bool:
    """Whether a value consists of plain values and our own frozen ones, all the way down."""
    if isinstance(value, dict):
        return all(map(all_typed, (*value.keys(), *value.values())))
    if isinstance(value, tuple | frozenset):
        return type(value) in {tuple, frozenset} and all(map(all_typed, value))
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
        return type(value) in BUILT and all(map(all_typed, parts))
    return type(value) in {str, int, float, bool, type(None), *BUILT}


def test_field_type_unknown_to_the_codec_is_a_bug() -> None:
    """It is noticed by the first test that sends one, not by a caller."""
    with pytest.raises(TypeError):
        codec.decoder_of(dict[str, int])
    with pytest.raises(TypeError):
        codec.decoder_of(bytes)
