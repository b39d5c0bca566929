"""Between the contract's messages and our values: nothing is lost, and nothing invented."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

import pytest
import refusals
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from convertd.v1 import convert_pb2 as pb
from convertd_core import creation_options, messages, proto_mapping, results, values
from convertd_daemon.front import translate

UNKNOWN: Any = 99
ENUMS = pb.DESCRIPTOR.enum_types_by_name
OPTIONS = pb.Destination.DESCRIPTOR.oneofs_by_name["options"].fields


def request(**dest: object) -> pb.ConvertRequest:
    """A request with both ends, and these fields of the destination."""
    return pb.ConvertRequest(
        source=pb.Source(path="/in/a"),
        dest=pb.Destination(**({"path": "/out/b", "format": "qcow2"} | dest)),  # type: ignore[arg-type]
    )


def numbers_of(kind: EnumDescriptor) -> list[int]:
    """Every value of an enum of the contract."""
    return [value.number for value in kind.values]


class TestRequests:
    """What is asked."""

    def test_missing_request_field_has_the_documented_default(self) -> None:
        """Every field of it."""
        assert translate.convert_request(request()) == values.ConvertRequest(
            source=values.Source(path="/in/a"),
            dest=values.Destination(path="/out/b", format="qcow2"),
        )

    def test_request_fields_are_all_converted(self) -> None:
        """Every field of it."""
        message = pb.ConvertRequest(
            source=pb.Source(path="/in/a", format="vmdk", encryption=pb.SourceEncryption()),
            dest=pb.Destination(
                path="/out/b",
                format="qcow2",
                encryption=pb.DestinationEncryption(
                    cipher_alg="serpent-128",
                    cipher_mode="cbc",
                    hash_alg="sha512",
                    ivgen_alg="essiv",
                    ivgen_hash_alg="sha1",
                    iter_time_milliseconds=7,
                ),
                compression=pb.COMPRESSION_ZSTD,
                preallocation=pb.PREALLOCATION_FULL,
                mode=0,
                group="images",
                overwrite=True,
                is_zero=True,
                qcow2=pb.Qcow2Options(cluster_size_bytes=512),
            ),
            cache_mode=pb.CACHE_MODE_DIRECTSYNC,
            verify=True,
            rate_limit_bytes_per_second=2**40,
            validate_only=True,
            label="nightly",
            reflink=pb.REFLINK_ALWAYS,
        )
        assert translate.convert_request(message) == values.ConvertRequest(
            source=values.Source(path="/in/a", format="vmdk", encryption=values.SourceEncryption()),
            dest=values.Destination(
                path="/out/b",
                format="qcow2",
                compression=values.Compression.ZSTD,
                preallocation=values.Preallocation.FULL,
                mode=0,
                group="images",
                overwrite=True,
                is_zero=True,
                encryption=values.DestinationEncryption(
                    cipher_alg="serpent-128",
                    cipher_mode="cbc",
                    hash_alg="sha512",
                    ivgen_alg="essiv",
                    ivgen_hash_alg="sha1",
                    iter_time_milliseconds=7,
                ),
                options=(values.CreationOption(name="cluster_size", value="512"),),
            ),
            cache_mode=values.CacheMode.DIRECTSYNC,
            verify=True,
            rate_limit_bytes_per_second=2**40,
            validate_only=True,
            label="nightly",
            reflink=values.Reflink.ALWAYS,
        )

    def test_encryption_without_values_has_the_defaults_of_nova(self) -> None:
        """The model's defaults."""
        message = request(encryption=pb.DestinationEncryption())
        assert translate.convert_request(message).dest.encryption == values.DestinationEncryption()

    def test_inspection_request_has_one_source(self) -> None:
        """With or without a format."""
        message = pb.InspectRequest(source=pb.Source(path="/in/a", format="vdi"))
        assert translate.inspect_request(message) == values.InspectRequest(
            source=values.Source(path="/in/a", format="vdi")
        )

    @pytest.mark.parametrize("number", numbers_of(ENUMS["CacheMode"]))
    def test_each_cache_mode_is_converted(self, number: int) -> None:
        """By its own name; left out, it is for the daemon to choose."""
        message = request()
        message.cache_mode = number  # type: ignore[assignment]
        known = translate.convert_request(message).cache_mode
        assert named(ENUMS["CacheMode"], number, unspecified="auto") == known.value

    @pytest.mark.parametrize("number", numbers_of(ENUMS["Compression"]))
    def test_each_compression_is_converted(self, number: int) -> None:
        """By its own name; left out, there is none."""
        known = translate.convert_request(request(compression=number)).dest.compression
        assert named(ENUMS["Compression"], number, unspecified="none") == known.value

    @pytest.mark.parametrize("number", numbers_of(ENUMS["Preallocation"]))
    def test_each_preallocation_is_converted(self, number: int) -> None:
        """By its own name; left out, it is off."""
        known = translate.convert_request(request(preallocation=number)).dest.preallocation
        assert named(ENUMS["Preallocation"], number, unspecified="off") == known.value

    @pytest.mark.parametrize(
        ("message", "field"),
        [
            pytest.param(pb.ConvertRequest(cache_mode=UNKNOWN), "cache_mode", id="cache-mode"),
            pytest.param(request(compression=UNKNOWN), "dest.compression", id="compression"),
            pytest.param(request(preallocation=UNKNOWN), "dest.preallocation", id="preallocation"),
            pytest.param(
                request(encryption=pb.DestinationEncryption(format=UNKNOWN)),
                "dest.encryption.format",
                id="encryption-of-the-destination",
            ),
            pytest.param(
                pb.ConvertRequest(source=pb.Source(encryption=pb.SourceEncryption(format=UNKNOWN))),
                "source.encryption.format",
                id="encryption-of-the-source",
            ),
            pytest.param(
                request(qcow2=pb.Qcow2Options(compat=UNKNOWN)),
                "dest.qcow2.compat",
                id="version-of-qcow2",
            ),
        ],
    )
    def test_enum_value_of_a_newer_contract_is_refused(
        self, message: pb.ConvertRequest, field: str
    ) -> None:
        """Not taken for the default: it was meant."""
        failure = refusals.refusal_of(lambda: translate.convert_request(message))
        assert failure is not None
        assert failure.reason == "BAD_OPTION"
        assert failure.message == f"{field}: has no value {UNKNOWN}"


def named(kind: EnumDescriptor, number: int, *, unspecified: str) -> str:
    """The name of an enum's value as our own enums have it."""
    full = kind.values_by_number[number].name
    name = full.rpartition("_")[2].lower()
    return unspecified if name == "unspecified" else name


def options_of(message: pb.Destination) -> dict[str, str]:
    """The options that a destination has for qemu, by name."""
    asked = pb.ConvertRequest(dest=message)
    return {item.name: item.value for item in translate.convert_request(asked).dest.options}


def values_of(field: FieldDescriptor) -> list[object]:
    """Values that an option's field may have, all of them if it is an enum."""
    if field.enum_type is not None:
        return [number for number in numbers_of(field.enum_type) if number]
    return [True] if field.type == FieldDescriptor.TYPE_BOOL else [64]


def fields_of(kind: FieldDescriptor) -> list[FieldDescriptor]:
    """The options of a format."""
    assert kind.message_type is not None
    return list(kind.message_type.fields)


class TestFormatOptions:
    """Those of each format."""

    @pytest.mark.parametrize(
        ("kind", "field", "value"),
        [
            pytest.param(
                kind.name, field.name, value, id=f"{kind.name}-{field.name}-{value}".lower()
            )
            for kind in OPTIONS
            for field in fields_of(kind)
            for value in values_of(field)
        ],
    )
    def test_each_format_option_has_the_name_and_value_of_qemu(
        self, kind: str, field: str, value: object
    ) -> None:
        """Whatever the contract has, the tables of options know."""
        dest = pb.Destination(format=kind)
        setattr(getattr(dest, kind), field, value)
        ((name, text),) = options_of(dest).items()
        assert name in creation_options.OPTIONS[kind]
        if not isinstance(value, bool) and value == 64:
            assert text == "64"
        else:
            option = creation_options.OPTIONS[kind][name]
            assert option.accepts(text) or text in option.refused

    @pytest.mark.parametrize("kind", [field.name for field in OPTIONS])
    def test_missing_format_option_is_left_to_qemu(self, kind: str) -> None:
        """A message of options with nothing in it asks for nothing."""
        dest = pb.Destination(format=kind)
        getattr(dest, kind).SetInParent()
        assert options_of(dest) == {}

    @pytest.mark.parametrize("kind", [field.name for field in OPTIONS])
    def test_options_of_another_format_are_refused(self, kind: str) -> None:
        """Whoever set them meant something else."""
        dest = pb.Destination(format="raw")
        getattr(dest, kind).SetInParent()
        failure = refusals.refusal_of(lambda: options_of(dest))
        assert failure is not None
        assert failure.message == f"dest.{kind}: are options of another format than 'raw'"


class TestRequestPassphrases:
    """Passphrases, which no other value ever holds."""

    @pytest.mark.parametrize(
        ("source", "dest", "expected"),
        [
            (None, None, []),
            (b"s", None, [b"s"]),
            (None, b"d", [b"d"]),
            (b"s", b"d", [b"s", b"d"]),
            (b"", b"d", [b"", b"d"]),
        ],
    )
    def test_passphrases_are_removed_from_the_message(
        self, source: bytes | None, dest: bytes | None, expected: list[bytes]
    ) -> None:
        """The source's first; afterwards the message has none, though it says that there are."""
        message = request()
        if source is not None:
            message.source.encryption.passphrase = source
        if dest is not None:
            message.dest.encryption.passphrase = dest
        assert translate.secrets(message) == expected
        assert translate.secrets(message) == [b""] * len(expected)
        asked = translate.convert_request(message)
        assert (asked.source.encryption is not None) is (source is not None)
        assert (asked.dest.encryption is not None) is (dest is not None)

    @given(st.binary(min_size=8, max_size=64))
    def test_passphrases_are_in_no_converted_value(self, passphrase: bytes) -> None:
        """Also if they are not taken out."""
        message = request(encryption=pb.DestinationEncryption(passphrase=passphrase))
        message.source.encryption.passphrase = passphrase
        assert repr(passphrase)[2:-1] not in repr(translate.convert_request(message))


CACHE = results.CacheChoice(mode=values.CacheMode.NONE, reason="it can")
RESULT = results.ConvertResult(
    published=True,
    source_format="qcow2",
    dest_format="raw",
    virtual_size_bytes=1000,
    allocated_size_bytes=4096,
    dest_cache=CACHE,
    source_cache=CACHE,
    warnings=(results.Warning(reason="SNAPSHOTS_DROPPED", message="2 of them"),),
    elapsed_seconds=2.0,
    bytes_per_second=500.0,
    verified=True,
    replaced=True,
    method=results.Method.QEMU_IMG,
    shared_bytes=0,
    written_bytes=4096,
)
JOB = results.Job(
    job_id="job-1",
    uid=1234,
    source_path="/in/a",
    source_format="",
    dest_path="/out/b",
    dest_format="raw",
    state=results.JobState.QUEUED,
    label="nightly",
    progress=results.Progress(phase=results.Phase.QUEUED, queue_position=2),
    create_time=None,
    start_time=None,
)
REPLIES = {
    pb.ConvertProgress: results.Progress,
    pb.ConvertResult: results.ConvertResult,
    pb.InspectResponse: results.ImageInfo,
    pb.Job: results.Job,
    pb.GetAccessResponse: results.Access,
    pb.Plan: results.Plan,
    pb.RefusalStats: messages.RefusalStats,
}
# What every number of the contract holds.
st.register_type_strategy(int, st.integers(0, 2**31 - 1))
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(datetime.datetime, st.datetimes(timezones=st.just(datetime.UTC)))
st.register_type_strategy(Mapping, st.dictionaries(st.text(), st.text()))


@pytest.mark.parametrize(("message", "kind"), REPLIES.items(), ids=lambda kind: kind.__name__)
@given(st.data())
def test_reply_round_trip_preserves_its_values(
    message: type[Message], kind: type[Any], data: st.DataObject
) -> None:
    """Each field at every depth, whatever its value."""
    value = data.draw(st.from_type(kind))
    if kind is results.ConvertResult:
        # It comes with an event of its own.
        value = dataclasses.replace(value, plan=None)
    told = proto_mapping.to_message(value, message())
    assert proto_mapping.from_message(kind, told) == value


class TestReplies:
    """What is answered."""

    def test_result_reply_has_durations_and_rate(self) -> None:
        """How long in all, how long in the queue, and how fast without the queue."""
        event = translate.result("job-1", RESULT, queued_s=3.0).result
        assert (event.job_id, event.published, event.verified) == ("job-1", True, True)
        assert event.replaced
        assert event.allocated_size_bytes == 4096
        assert [warning.reason for warning in event.warnings] == ["SNAPSHOTS_DROPPED"]
        assert event.queued_seconds == 3.0
        assert event.elapsed_seconds == 5.0
        assert event.bytes_per_second == 500.0

    @pytest.mark.parametrize("state", list(results.JobState)[1:])
    def test_job_reply_has_its_state_and_times(self, state: results.JobState) -> None:
        """With its times, the start only if it has started."""
        when = datetime.datetime(2026, 11, 29, 1, 2, 3, 250_000, datetime.UTC)
        waiting = dataclasses.replace(JOB, state=state, create_time=when)
        listed = translate.job(waiting, None)
        assert pb.JobState.Name(listed.state) == f"JOB_STATE_{state.name}"
        assert listed.create_time.ToDatetime(datetime.UTC) == when
        assert not listed.HasField("start_time")
        began = translate.job(dataclasses.replace(waiting, start_time=when), None)
        assert began.start_time.ToDatetime(datetime.UTC) == when

    def test_job_reply_has_the_progress_that_its_caller_has_seen(self) -> None:
        """The broker knows only whether a job waits, and where."""
        seen = pb.ConvertProgress(job_id="job-1", phase=pb.PHASE_CONVERTING, percent=3.0)
        assert translate.job(JOB, seen).progress == seen

    @pytest.mark.parametrize(
        "seen", [None, pb.ConvertProgress(phase=pb.PHASE_QUEUED, queue_position=7)]
    )
    def test_job_reply_has_the_present_position_in_the_queue(
        self, seen: pb.ConvertProgress | None
    ) -> None:
        """Whatever its caller was told last, if anything."""
        listed = translate.job(JOB, seen)
        assert (listed.progress.phase, listed.progress.queue_position) == (pb.PHASE_QUEUED, 2)


def test_each_request_field_is_read() -> None:
    """A field that nobody reads is a promise that nobody keeps: each changes what is asked."""
    changed: dict[str, dict[str, object]] = {
        "path": {"path": "/c"},
        "format": {"format": "vdi"},
        "encryption": {"encryption": pb.DestinationEncryption()},
        "compression": {"compression": pb.COMPRESSION_ZLIB},
        "preallocation": {"preallocation": pb.PREALLOCATION_FULL},
        "mode": {"mode": 0o640},
        "group": {"group": "images"},
        "overwrite": {"overwrite": True},
        "is_zero": {"is_zero": True},
    }
    plain = translate.convert_request(request())
    for fields in changed.values():
        assert translate.convert_request(request(**fields)) != plain
    assert {field.name for field in pb.Destination.DESCRIPTOR.fields} == {
        *changed,
        *(field.name for field in OPTIONS),
    }
