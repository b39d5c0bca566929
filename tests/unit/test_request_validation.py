"""What a request must be, whatever the policy says."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import refusals
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import (
    codec,
    conditions,
    validation,
    values,
)

C, P = values.Compression, values.Preallocation


def request(
    source: str = "/in/disk.raw", dest: str = "/out/disk.qcow2", *, rate: int = 0, label: str = ""
) -> values.ConvertRequest:
    """A request that is fine with the defaults."""
    return values.ConvertRequest(
        source=values.Source(path=source),
        dest=values.Destination(path=dest, format="qcow2"),
        rate_limit_bytes_per_second=rate,
        label=label,
    )


def to(**changes: object) -> values.ConvertRequest:
    """A request for a destination that is fine, but for the changes."""
    dest = dataclasses.replace(request().dest, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(request(), dest=dest)


def sharing(**changes: object) -> values.ConvertRequest:
    """The same, for a result that shares the source's blocks."""
    return dataclasses.replace(to(**changes), reflink=values.Reflink.ALWAYS)


def of(name: str, *, encrypted: bool = False) -> values.ConvertRequest:
    """A request that states the source's format, and whether a passphrase comes along."""
    encryption = values.SourceEncryption() if encrypted else None
    source = values.Source(path="/in/a", format=name, encryption=encryption)
    return dataclasses.replace(request(), source=source)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        pytest.param("", "is not absolute", id="empty"),
        pytest.param("disk.raw", "is not absolute", id="relative"),
        pytest.param("/in/../disk.raw", "has '..' in it", id="leading-up"),
        pytest.param("/in/..", "has '..' in it", id="ending-in-up"),
        pytest.param("/in/./disk.raw", "has an empty name or '.' in it", id="with-a-dot"),
        pytest.param("/in//disk.raw", "has an empty name or '.' in it", id="with-two-slashes"),
        pytest.param("/in/disk.raw/", "has an empty name or '.' in it", id="with-a-last-slash"),
        pytest.param("/", "has an empty name or '.' in it", id="the-root-directory"),
        pytest.param("/in/\0", "has a NUL in it", id="with-a-nul"),
        pytest.param("/in/\udcff", "is not valid UTF-8", id="of-other-bytes-than-utf-8"),
        pytest.param("/" + "a" * 256, "has a name longer than 255 bytes", id="of-a-long-name"),
        pytest.param("/" + "ä" * 128, "has a name longer than 255 bytes", id="of-a-long-wide-name"),
        pytest.param("/a" * 2048, "is longer than 4095 bytes", id="of-4096-bytes"),
        pytest.param("/ä" * 80_000, "is longer than 4095 bytes", id="of-240000-bytes"),
    ],
)
def test_invalid_path_is_refused(path: str, problem: str) -> None:
    """In each place where a path can stand; and the refusal itself can be sent."""
    asked = {
        "source.path": request(source=path),
        "dest.path": request(dest=path),
    }
    for field, each in asked.items():
        with pytest.raises(conditions.BadPath) as refusal:
            validation.checked_convert(each)
        assert (refusal.value.field, refusal.value.problem) == (field, problem)
        assert len(codec.encode(refusal.value.failure())) < 2048
    with pytest.raises(conditions.BadPath):
        validation.checked_inspect(values.InspectRequest(source=values.Source(path=path)))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/a" * 2047 + "b", id="4095-bytes-long"),
        pytest.param("/" + "a" * 255, id="a-name-of-255-bytes"),
        pytest.param("/in/new\nline", id="a-newline"),
        pytest.param("/in/a,b=c'd\"e\\f", id="what-qemu-and-shells-find-special"),
        pytest.param("/in/...", id="three-dots"),
        pytest.param("/in/ünï", id="beyond-ascii"),
        pytest.param("/in/json:{}", id="a-protocol-of-qemus"),
    ],
)
def test_path_may_contain(path: str) -> None:
    """A file may have any such name."""
    assert validation.checked_convert(request(source=path)).source.path == path
    assert validation.checked_convert(request(dest=path)).dest.path == path


@given(st.text(st.characters(exclude_categories=())))
def test_random_path_is_absolute_and_normal_or_refused(path: str) -> None:
    """Nothing else is raised, and the refusal can be sent."""
    problem = refusal_of(path)
    names = path.split("/")[1:]
    fine = path.startswith("/") and not {"", ".", ".."}.intersection(names) and "\0" not in path
    assert fine or problem
    assert codec.encode(conditions.BadPath(field="", path=problem, problem="").failure())


def refusal_of(path: str) -> str:
    """What is said of a path that is refused; nothing for one that is not."""
    try:
        validation.checked_inspect(values.InspectRequest(source=values.Source(path=path)))
    except conditions.BadPath as refusal:
        return str(refusal)
    return ""


def test_source_as_its_own_destination_is_refused() -> None:
    """Not by the same name; by another name of the same file the job finds it out."""
    with pytest.raises(conditions.BadPath, match="is the source"):
        validation.checked_convert(request(source="/in/a", dest="/in/a"))


def test_destination_named_like_a_temporary_is_refused() -> None:
    """It could be taken for one that was left behind, and be removed."""
    with pytest.raises(conditions.BadPath, match="keeps for itself"):
        validation.checked_convert(request(dest="/out/.convertd-1.tmp"))
    asked = request(source="/out/.convertd-1.tmp")
    assert validation.checked_convert(asked) == asked


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        pytest.param(of("nbd"), "source.format", id="unknown-to-read"),
        pytest.param(to(format="iso"), "dest.format", id="unknown-to-write"),
        pytest.param(to(format=""), "dest.format", id="not-stated-to-write"),
        pytest.param(to(format="dmg"), "dest.format", id="readable-only"),
        pytest.param(to(format="nbd\udc00" * 99), "dest.format", id="not-even-text"),
    ],
)
def test_unknown_format_is_refused(asked: values.ConvertRequest, field: str) -> None:
    """Only qemu's names for single files are known."""
    with pytest.raises(conditions.BadFormat) as refusal:
        validation.checked_convert(asked)
    assert refusal.value.field == field
    assert codec.encode(refusal.value.failure())


@pytest.mark.parametrize("name", sorted(values.WRITABLE_FORMATS - {"luks"}))
def test_known_format_is_accepted(name: str) -> None:
    """To read and to write."""
    asked = dataclasses.replace(to(format=name), source=values.Source(path="/in/a", format=name))
    assert validation.checked_convert(asked) == asked


ENCRYPTION = values.DestinationEncryption()
QCOW2_AND_LUKS = {"qcow2", "luks"}


@pytest.mark.parametrize("name", sorted(values.FORMATS))
def test_passphrase_is_accepted_for_luks_and_qcow2_only_and_required_for_luks(name: str) -> None:
    """LUKS itself, and LUKS in a qcow2; at each end."""
    plain, encrypted = of(name), of(name, encrypted=True)
    assert (refused_field(plain) == "source.encryption") is (name == "luks")
    assert (refused_field(encrypted) == "source.encryption") is (name not in QCOW2_AND_LUKS)
    if name in values.WRITABLE_FORMATS:
        plain, encrypted = to(format=name), to(format=name, encryption=ENCRYPTION)
        assert (refused_field(plain) == "dest.encryption") is (name == "luks")
        assert (refused_field(encrypted) == "dest.encryption") is (name not in QCOW2_AND_LUKS)


def test_passphrase_for_an_unstated_source_format_is_checked_after_the_probe() -> None:
    """The job holds the two together when it knows."""
    assert refused_field(of("", encrypted=True)) == ""


def test_inspection_of_an_encrypted_image_needs_no_passphrase() -> None:
    """Its header can be read."""
    asked = values.InspectRequest(source=of("luks").source)
    assert validation.checked_inspect(asked) == asked


@pytest.mark.parametrize("name", ["nbd", "json:{}", "RAW"])
def test_inspection_with_an_unknown_format_is_refused(name: str) -> None:
    """As to convert it."""
    with pytest.raises(conditions.BadFormat):
        validation.checked_inspect(values.InspectRequest(source=of(name).source))


def test_invalid_format_or_cipher_option_in_a_request_is_refused() -> None:
    """What the tables of options say holds for whole requests."""
    option = values.CreationOption(name="backing_file", value="/etc/shadow")
    assert refused_field(to(options=(option,))) == "dest.qcow2.backing_file"
    weak = dataclasses.replace(ENCRYPTION, cipher_alg="rot13")
    assert refused_field(to(encryption=weak)) == "dest.encryption.cipher_alg"


def test_compression_with_encryption_is_refused() -> None:
    """Neither in qemu-img, which says so only once it runs."""
    asked = to(encryption=ENCRYPTION, compression=C.ZLIB)
    assert refused_field(asked) == "dest.compression"


@pytest.mark.parametrize(
    ("compression", "layout", "expected"),
    [
        (C.ZLIB, "streamOptimized", ""),
        (C.DEFAULT, "streamOptimized", ""),
        (C.ZSTD, "streamOptimized", "dest.compression"),
        (C.ZLIB, "monolithicSparse", "dest.compression"),
    ],
)
def test_vmdk_compression_needs_stream_optimized_and_zlib(
    compression: values.Compression, layout: str, expected: str
) -> None:
    """streamOptimized, with or without being asked."""
    options = (values.CreationOption(name="subformat", value=layout),)
    asked = to(format="vmdk", compression=compression, options=options)
    assert refused_field(asked) == expected


def refused_field(asked: values.ConvertRequest) -> str:
    """The field for which a request is refused; nothing if it is not."""
    failure = refusals.refusal_of(lambda: validation.checked_convert(asked))
    return dict(failure.values)["field"] if failure else ""


POSSIBLE = {
    *((name, C.NONE, P.OFF) for name in values.WRITABLE_FORMATS - {"luks"}),
    *(("qcow2", C.NONE, each) for each in P),
    *(("qcow2", each, P.OFF) for each in C),
    ("raw", C.NONE, P.FALLOC),
    ("raw", C.NONE, P.FULL),
}


@pytest.mark.parametrize(
    ("name", "compression", "preallocation"),
    list(itertools.product(sorted(values.WRITABLE_FORMATS - {"luks"}), C, P)),
)
def test_compression_and_preallocation_are_refused_where_qemu_img_has_none(
    name: str, compression: values.Compression, preallocation: values.Preallocation
) -> None:
    """All combinations, against the list of those that qemu-img can do."""
    asked = to(format=name, compression=compression, preallocation=preallocation)
    if (name, compression, preallocation) in POSSIBLE:
        assert validation.checked_convert(asked).dest.format == name
    else:
        with pytest.raises(conditions.BadOption, match=r"^dest\.(compression|preallocation): "):
            validation.checked_convert(asked)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (C.NONE, C.NONE),
        (C.DEFAULT, C.ZLIB),
        (C.ZLIB, C.ZLIB),
        (C.ZSTD, C.ZSTD),
    ],
)
def test_default_compression_of_a_request_becomes_zlib(
    asked: values.Compression, named: values.Compression
) -> None:
    """And every other is what was asked."""
    assert validation.checked_convert(to(compression=asked)).dest.compression is named


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        pytest.param(to(mode=0o700), "dest.mode", id="an-executable"),
        pytest.param(to(mode=0o4600), "dest.mode", id="setuid"),
        pytest.param(to(mode=0o10000), "dest.mode", id="bits-that-are-none"),
        pytest.param(to(mode=-1), "dest.mode", id="a-negative-mode"),
        pytest.param(to(group="a b"), "dest.group", id="a-group-of-two-words"),
        pytest.param(to(group="-1"), "dest.group", id="a-negative-gid"),
        pytest.param(to(group="wheel\n"), "dest.group", id="a-group-with-a-newline"),
        pytest.param(to(group="٣"), "dest.group", id="a-gid-in-other-digits"),
        pytest.param(
            request(rate=2**20 - 1),
            "rate_limit_bytes_per_second",
            id="a-rate-under-1-MiB",
        ),
        pytest.param(
            request(rate=-1),
            "rate_limit_bytes_per_second",
            id="a-negative-rate",
        ),
        pytest.param(
            request(rate=2**63),
            "rate_limit_bytes_per_second",
            id="a-rate-beyond-qemu-img",
        ),
        pytest.param(sharing(compression=C.ZLIB), "reflink", id="shared-blocks-and-compression"),
        pytest.param(
            sharing(preallocation=P.METADATA), "reflink", id="shared-blocks-and-preallocation"
        ),
        pytest.param(
            sharing(encryption=values.DestinationEncryption()),
            "reflink",
            id="shared-blocks-and-encryption",
        ),
        pytest.param(
            dataclasses.replace(of("luks", encrypted=True), reflink=values.Reflink.ALWAYS),
            "reflink",
            id="shared-blocks-and-decryption",
        ),
        pytest.param(request(label="x" * 129), "label", id="a-long-label"),
        pytest.param(request(label="ä" * 65), "label", id="a-label-long-in-bytes"),
        pytest.param(request(label="a\nb"), "label", id="a-label-of-two-lines"),
        pytest.param(request(label="\udc00"), "label", id="a-label-that-is-no-text"),
    ],
)
def test_request_option_is_refused(asked: values.ConvertRequest, field: str) -> None:
    """With the field's name, and in a form that can be sent."""
    with pytest.raises(conditions.BadOption) as refusal:
        validation.checked_convert(asked)
    assert refusal.value.field == field
    assert codec.encode(refusal.value.failure())


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(to(mode=0), id="no-permissions"),
        pytest.param(to(mode=0o666), id="all-permissions"),
        pytest.param(to(group="libvirt-qemu"), id="a-group"),
        pytest.param(to(group="host$"), id="a-machine-account"),
        pytest.param(to(group="107"), id="a-gid"),
        pytest.param(request(rate=2**20), id="the-least-rate"),
        pytest.param(request(rate=2**63 - 1), id="the-most-rate"),
        pytest.param(request(label="x" * 128), id="the-longest-label"),
        pytest.param(request(label="ä" * 64), id="the-longest-wide-label"),
        pytest.param(request(label="über Nacht"), id="a-label-beyond-ascii"),
    ],
)
def test_request_option_is_accepted(asked: values.ConvertRequest) -> None:
    """And nothing in the request changes."""
    assert validation.checked_convert(asked) == asked


@given(st.text(st.characters(exclude_categories=())))
def test_displayed_text_is_short_and_valid_unicode(text: str) -> None:
    """Whatever a caller wrote."""
    shown = validation.shown(text)
    assert len(shown) <= 257
    assert shown.encode().decode() == shown
