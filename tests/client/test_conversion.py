"""What is asked for, before it is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convertd_client import conversion, errors, results
from convertd_client.conversion import ConvertOptions
from convertd_core import values


def test_omitted_options_have_the_defaults_of_the_contract() -> None:
    """Nothing but the two ends and the format is needed."""
    asked = conversion.asked("/a", Path("/b"), "qcow2", {}).request
    assert asked == values.ConvertRequest(
        source=values.Source(path="/a"), dest=values.Destination(path="/b", format="qcow2")
    )


@pytest.mark.parametrize(
    ("options", "compression"),
    [
        (ConvertOptions(compress=True), results.Compression.DEFAULT),
        (ConvertOptions(compress=True, compression="zstd"), results.Compression.ZSTD),
        (ConvertOptions(compression="zlib"), results.Compression.ZLIB),
    ],
    ids=["compress", "both", "compression"],
)
def test_explicit_compression_overrides_the_compress_flag(
    options: ConvertOptions, compression: results.Compression
) -> None:
    """Which leaves the choice to the policy."""
    assert conversion.asked("/a", "/b", "qcow2", options).request.dest.compression is compression


@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions(cache_mode="unsafe"),
        ConvertOptions(cache_mode="unspecified"),
        ConvertOptions(compression="lzma"),
        ConvertOptions(preallocation="some"),
        ConvertOptions(mode=-1),
        ConvertOptions(mode=1 << 32),
        ConvertOptions(rate_limit=1 << 64),
        ConvertOptions(group="\udcff"),
        ConvertOptions(cluster_size=-1),
        ConvertOptions(cluster_size=1 << 64),
        ConvertOptions(cluster_size="64K"),  # type: ignore[typeddict-item]
        ConvertOptions(refcount_bits=1 << 32),
        ConvertOptions(compat="2"),
        ConvertOptions(lazy_refcounts="on"),  # type: ignore[typeddict-item]
        ConvertOptions(subformat="fixed"),
    ],
    ids=str,
)
def test_value_not_in_the_contract_is_refused(options: ConvertOptions) -> None:
    """With the reason that the daemon gives for values that it refuses."""
    with pytest.raises(errors.InvalidArgument) as caught:
        conversion.asked("/a", "/b", "qcow2", options)
    assert caught.value.reason == "BAD_OPTION"


def test_empty_format_options_are_not_sent() -> None:
    """None, False and 0 leave it to qemu, whatever the format."""
    nothing = ConvertOptions(cluster_size=0, subformat=None, static=False)
    assert conversion.asked("/a", "/b", "raw", nothing).request.dest.options == ()


def test_path_that_is_not_utf_8_is_refused_by_the_client() -> None:
    """The contract can't carry it."""
    with pytest.raises(errors.InvalidArgument) as caught:
        conversion.asked(os.fsdecode(b"/a\xff"), "/b", "qcow2", {})
    assert caught.value.reason == "BAD_PATH"
    str(caught.value).encode()


def test_unknown_option_is_a_type_error() -> None:
    """As for any function."""
    with pytest.raises(TypeError, match="'overwriet'"):
        conversion.asked("/a", "/b", "qcow2", {"overwriet": True})  # type: ignore[typeddict-unknown-key]


def test_passphrase_is_not_in_the_repr() -> None:
    """In a log or a traceback."""
    asked = conversion.asked("/a", "/b", "luks", {"dest_secret": b"hunter2"})
    assert "hunter2" not in repr(asked)


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("/a//b/./c/", "/a/b/c"),
        ("a", "{here}/a"),
        ("./a/b", "{here}/a/b"),
        ("../a", "{above}/a"),
        ("x/../a", "{here}/x/../a"),
        ("/a/../b", "/a/../b"),
    ],
)
def test_relative_path_is_made_absolute_without_resolving_symlinks(
    path: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`x/..` is another directory than the current one if x is a link."""
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    expected = absolute.format(here=here, above=os.path.dirname(here))
    assert conversion.absolute(path) == expected


def test_parent_references_above_the_root_end_at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the kernel."""
    monkeypatch.chdir("/usr")
    assert conversion.absolute("../../../a") == "/a"


def test_relative_path_without_a_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was removed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(errors.InvalidArgument):
        conversion.absolute("a")
    assert conversion.absolute("/a") == "/a"


def test_empty_path_is_refused() -> None:
    """It is not the working directory."""
    with pytest.raises(errors.InvalidArgument):
        conversion.absolute("")
