"""What a request must be, whatever the policy says."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convertd_daemon import codec, errors, model, validation

C, P = model.Compression, model.Preallocation


def request(
    source: str = "/in/disk.raw", dest: str = "/out/disk.qcow2", *, rate: int = 0, label: str = ""
) -> model.ConvertRequest:
    """A request that is fine with the defaults."""
    return model.ConvertRequest(
        source=model.Source(path=source),
        dest=model.Dest(path=dest, format="qcow2"),
        rate_limit_bytes_per_second=rate,
        label=label,
    )


def to(**changes: object) -> model.ConvertRequest:
    """A request for a destination that is fine, but for the changes."""
    dest = dataclasses.replace(request().dest, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(request(), dest=dest)


def of(name: str) -> model.ConvertRequest:
    """A request that states the source's format."""
    return dataclasses.replace(request(), source=model.Source(path="/in/a", format=name))


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
def test_a_path_is_refused(path: str, problem: str) -> None:
    """In each place where a path can stand; and the refusal itself can be sent."""
    asked = {
        "source.path": request(source=path),
        "dest.path": request(dest=path),
    }
    for field, each in asked.items():
        with pytest.raises(errors.BadPath) as refusal:
            validation.checked_convert(each)
        assert (refusal.value.field, refusal.value.problem) == (field, problem)
        assert len(codec.encode(refusal.value.failure())) < 2048
    with pytest.raises(errors.BadPath):
        validation.checked_inspect(model.InspectRequest(source=model.Source(path=path)))


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
def test_a_path_may_hold(path: str) -> None:
    """A file may have any such name."""
    assert validation.checked_convert(request(source=path)).source.path == path
    assert validation.checked_convert(request(dest=path)).dest.path == path


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_the_path_it_is_absolute_and_normal_or_refused(path: str) -> None:
    """Nothing else is raised, and the refusal can be sent."""
    problem = refusal_of(path)
    names = path.split("/")[1:]
    fine = path.startswith("/") and not {"", ".", ".."}.intersection(names) and "\0" not in path
    assert fine or problem
    assert codec.encode(errors.BadPath(field="", path=problem, problem="").failure())


def refusal_of(path: str) -> str:
    """What is said of a path that is refused; nothing for one that is not."""
    try:
        validation.checked_inspect(model.InspectRequest(source=model.Source(path=path)))
    except errors.BadPath as refusal:
        return str(refusal)
    return ""


def test_the_source_is_no_destination() -> None:
    """Not by the same name; by another name of the same file the job finds it out."""
    with pytest.raises(errors.BadPath, match="is the source"):
        validation.checked_convert(request(source="/in/a", dest="/in/a"))


def test_a_name_like_convertds_own_temporaries_is_refused_for_a_result() -> None:
    """It could be taken for one that was left behind, and be removed."""
    with pytest.raises(errors.BadPath, match="keeps for itself"):
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
def test_a_format_is_refused(asked: model.ConvertRequest, field: str) -> None:
    """Only qemu's names for single files are known."""
    with pytest.raises(errors.BadFormat) as refusal:
        validation.checked_convert(asked)
    assert refusal.value.field == field
    assert codec.encode(refusal.value.failure())


@pytest.mark.parametrize("name", sorted(model.WRITABLE_FORMATS - {"luks"}))
def test_a_format_is_accepted(name: str) -> None:
    """To read and to write."""
    asked = dataclasses.replace(to(format=name), source=model.Source(path="/in/a", format=name))
    assert validation.checked_convert(asked) == asked


def test_the_format_luks_needs_a_passphrase() -> None:
    """Which a request can't carry yet. To look at the header takes none."""
    with pytest.raises(errors.BadOption, match=r"^dest\.encryption: "):
        validation.checked_convert(to(format="luks"))
    with pytest.raises(errors.BadOption, match=r"^source\.encryption: "):
        validation.checked_convert(of("luks"))
    asked = model.InspectRequest(source=of("luks").source)
    assert validation.checked_inspect(asked) == asked


POSSIBLE = {
    *((name, C.NONE, P.OFF) for name in model.WRITABLE_FORMATS - {"luks"}),
    *(("qcow2", C.NONE, each) for each in P),
    *(("qcow2", each, P.OFF) for each in C),
    ("raw", C.NONE, P.FALLOC),
    ("raw", C.NONE, P.FULL),
}


@pytest.mark.parametrize(
    ("name", "compression", "preallocation"),
    list(itertools.product(sorted(model.WRITABLE_FORMATS - {"luks"}), C, P)),
)
def test_compression_and_preallocation_go_with_few_formats(
    name: str, compression: model.Compression, preallocation: model.Preallocation
) -> None:
    """All combinations, against the list of those that qemu-img can do."""
    asked = to(format=name, compression=compression, preallocation=preallocation)
    if (name, compression, preallocation) in POSSIBLE:
        assert validation.checked_convert(asked).dest.format == name
    else:
        with pytest.raises(errors.BadOption, match=r"^dest\.(compression|preallocation): "):
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
def test_default_compression_is_zlib(asked: model.Compression, named: model.Compression) -> None:
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
        pytest.param(request(label="x" * 257), "label", id="a-long-label"),
        pytest.param(request(label="a\nb"), "label", id="a-label-of-two-lines"),
        pytest.param(request(label="\udc00"), "label", id="a-label-that-is-no-text"),
    ],
)
def test_an_option_is_refused(asked: model.ConvertRequest, field: str) -> None:
    """With the field's name, and in a form that can be sent."""
    with pytest.raises(errors.BadOption) as refusal:
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
        pytest.param(request(label="x" * 256), id="the-longest-label"),
        pytest.param(request(label="über Nacht"), id="a-label-beyond-ascii"),
    ],
)
def test_an_option_is_accepted(asked: model.ConvertRequest) -> None:
    """And nothing in the request changes."""
    assert validation.checked_convert(asked) == asked


@given(st.text(st.characters(exclude_categories=())))
def test_a_text_that_is_shown_can_be_sent_and_is_short(text: str) -> None:
    """Whatever a caller wrote."""
    shown = validation.shown(text)
    assert len(shown) <= 257
    assert shown.encode().decode() == shown
