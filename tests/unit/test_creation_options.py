"""The options with which an image is created: those in the tables, and no others."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest
import refusals
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import (
    codec,
    conditions,
    creation_options,
    values,
)

MIB = 1024 * 1024


def dest(image_format: str, *options: tuple[str, str], **changes: object) -> values.Destination:
    """A destination of that format, with these options."""
    asked = values.Destination(
        path="/out/disk",
        format=image_format,
        options=tuple(values.CreationOption(name=name, value=value) for name, value in options),
    )
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def refusal_of(asked: values.Destination) -> conditions.Failure | None:
    """The condition that speaks against a destination, as its receiver gets it."""
    return refusals.refusal_of(lambda: creation_options.check(asked))


ACCEPTED = [
    ("qcow2", "cluster_size", ("512", "65536", "2097152")),
    ("qcow2", "compat", ("0.10", "1.1")),
    ("qcow2", "lazy_refcounts", ("on", "off")),
    ("qcow2", "refcount_bits", ("1", "2", "4", "8", "16", "32", "64")),
    ("qcow2", "extended_l2", ("on", "off")),
    ("vmdk", "subformat", ("monolithicSparse", "streamOptimized")),
    ("vmdk", "adapter_type", ("ide", "lsilogic", "buslogic", "legacyESX")),
    ("vmdk", "hwversion", ("1", "4", "99")),
    ("vmdk", "zeroed_grain", ("on", "off")),
    ("vdi", "static", ("on", "off")),
    ("vpc", "subformat", ("dynamic", "fixed")),
    ("vhdx", "subformat", ("dynamic", "fixed")),
    ("vhdx", "block_size", (str(MIB), str(256 * MIB))),
    ("vhdx", "log_size", (str(MIB), str(3 * MIB), str(4095 * MIB))),
    ("qed", "cluster_size", ("4096", str(64 * MIB))),
    ("qed", "table_size", ("2", "4", "16")),
    ("parallels", "cluster_size", ("512", "1536", str(256 * MIB))),
]

REFUSED = [
    ("qcow2", "cluster_size", ("0", "256", "513", "4194304", "64K", "-512", "512.0", "")),
    ("qcow2", "compat", ("1.0", "v3", "")),
    ("qcow2", "lazy_refcounts", ("true", "1", "On", "")),
    ("qcow2", "refcount_bits", ("0", "3", "128", "٨")),
    ("qcow2", "extended_l2", ("yes",)),
    ("vmdk", "subformat", ("sparse", "monolithicsparse")),
    ("vmdk", "adapter_type", ("scsi",)),
    ("vmdk", "hwversion", ("0", "100", "undefined", "4,subformat=monolithicFlat")),
    ("vpc", "subformat", ("vhd",)),
    ("vhdx", "block_size", ("0", str(MIB - 1), str(3 * MIB), str(512 * MIB))),
    ("vhdx", "log_size", (str(MIB + 1), str(4096 * MIB), "9" * 13)),
    ("qed", "cluster_size", ("2048", str(128 * MIB))),
    ("qed", "table_size", ("0", "1", "3", "32")),
    ("parallels", "cluster_size", ("0", "511", "513", str(512 * MIB))),
]


def each(
    table: list[tuple[str, str, tuple[str, ...]]],
) -> list[tuple[str, str, str]]:
    """One case for each value."""
    return [(kind, name, value) for kind, name, choices in table for value in choices]


def test_option_test_values_cover_every_option() -> None:
    """Whoever adds an option says here what it may be."""
    known = {(kind, name) for kind, names in creation_options.OPTIONS.items() for name in names}
    assert {(kind, name) for kind, name, _ in ACCEPTED} == known


@pytest.mark.parametrize(("kind", "name", "value"), each(ACCEPTED))
def test_option_value_is_accepted(kind: str, name: str, value: str) -> None:
    """Also with whichever compression the caller may ask for."""
    assert refusal_of(dest(kind, (name, value))) is None


@pytest.mark.parametrize(("kind", "name", "value"), each(REFUSED))
def test_option_value_is_refused(kind: str, name: str, value: str) -> None:
    """With the name of the field."""
    refused = refusal_of(dest(kind, (name, value)))
    assert refused is not None
    assert refused.reason == "BAD_OPTION"
    assert dict(refused.values)["field"] == f"dest.{kind}.{name}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param("qcow2", "backing_file", id="another-image"),
        pytest.param("qcow2", "data_file", id="another-file-for-the-data"),
        pytest.param("qcow2", "data_file_raw", id="that-it-is-raw"),
        pytest.param("qcow2", "encrypt.key-secret", id="a-secret-of-another-end"),
        pytest.param("qcow2", "preallocation", id="preallocation-which-has-a-field"),
        pytest.param("vmdk", "backing_file", id="a-parent"),
        pytest.param("raw", "size", id="anything-for-raw"),
        pytest.param("luks", "key-secret", id="anything-for-luks"),
        pytest.param("nbd", "host", id="anything-for-what-is-no-format"),
        pytest.param("qcow2", "cluster_size,backing_file", id="two-in-one"),
        pytest.param("qcow2", "", id="no-name"),
        pytest.param("qcow2", "\ud800", id="a-name-that-is-no-text"),
        pytest.param("qcow2", "x" * 100_000, id="a-very-long-name"),
    ],
)
def test_unknown_option_is_refused(kind: str, name: str) -> None:
    """Whoever took the front over can't name a file by an option; and the refusal can be sent."""
    refused = refusal_of(dest(kind, (name, "/etc/shadow")))
    assert refused is not None
    assert refused.reason == "BAD_OPTION"
    assert len(codec.encode(refused)) < 1024


@given(st.sampled_from(sorted(values.FORMATS)), st.text(max_size=20), st.text(max_size=20))
def test_random_option_is_in_the_tables_or_refused(kind: str, name: str, value: str) -> None:
    """And what is accepted can't be taken for two options by qemu."""
    if refusal_of(dest(kind, (name, value))) is None:
        assert name in creation_options.OPTIONS[kind]
        assert re.fullmatch(r"[A-Za-z0-9.]+", value)


def test_duplicate_option_is_refused() -> None:
    """Of the two, qemu would take the last one, whichever that is."""
    refused = refusal_of(dest("qcow2", ("compat", "1.1"), ("compat", "0.10")))
    assert refused is not None
    assert refused.message == "dest.qcow2: has an option twice"


@pytest.mark.parametrize("layout", creation_options.OPTIONS["vmdk"]["subformat"].refused)
def test_vmdk_subformat_of_several_files_is_unsupported(layout: str) -> None:
    """A result is one file. Not a mistake of the caller's, so not INVALID_ARGUMENT."""
    refused = refusal_of(dest("vmdk", ("subformat", layout)))
    assert refused is not None
    assert refused.status is conditions.Status.UNIMPLEMENTED
    assert layout in refused.message


V2 = ("compat", "0.10")
ZSTD = {"compression": values.Compression.ZSTD}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        pytest.param(dest("qcow2", V2, ("lazy_refcounts", "on")), "lazy_refcounts", id="lazy"),
        pytest.param(dest("qcow2", V2, ("refcount_bits", "8")), "refcount_bits", id="8-bits"),
        pytest.param(dest("qcow2", V2, ("extended_l2", "on")), "extended_l2", id="subclusters"),
        pytest.param(dest("qcow2", V2, **ZSTD), "compression", id="zstd"),
        pytest.param(
            dest("qcow2", ("extended_l2", "on"), ("cluster_size", "8192")),
            "extended_l2",
            id="subclusters-in-small-clusters",
        ),
    ],
)
def test_incompatible_qcow2_options_are_refused(asked: values.Destination, field: str) -> None:
    """With the field that can't be had."""
    refused = refusal_of(asked)
    assert refused is not None
    assert dict(refused.values)["field"] == f"dest.qcow2.{field}"


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(dest("qcow2", V2), id="the-old-version"),
        pytest.param(dest("qcow2", V2, ("lazy_refcounts", "off")), id="old-and-not-lazy"),
        pytest.param(dest("qcow2", V2, ("refcount_bits", "16")), id="old-with-16-bits"),
        pytest.param(dest("qcow2", ("compat", "1.1"), **ZSTD), id="new-with-zstd"),
        pytest.param(dest("qcow2", **ZSTD), id="zstd"),
        pytest.param(dest("qcow2", ("extended_l2", "on")), id="subclusters"),
        pytest.param(
            dest("qcow2", ("extended_l2", "on"), ("cluster_size", "16384")),
            id="subclusters-in-clusters-that-are-just-large-enough",
        ),
    ],
)
def test_compatible_qcow2_options_are_accepted(asked: values.Destination) -> None:
    """What qemu-img can make is not refused."""
    assert refusal_of(asked) is None


def cipher(name: str, value: str) -> values.DestinationEncryption:
    """Encryption as by default, but for one value."""
    return dataclasses.replace(values.DestinationEncryption(), **{name: value})  # type: ignore[arg-type]


class TestEncryption:
    """LUKS, in qemu's terms."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            (name, value)
            for name, choices in creation_options.CIPHERS.items()
            for value in sorted(choices)
        ],
    )
    def test_cipher_in_the_table_is_accepted(self, name: str, value: str) -> None:
        """By its name in the contract."""
        asked = cipher(name, value)
        assert refusal_of(dest("luks", encryption=asked)) is None

    @pytest.mark.parametrize("name", sorted(creation_options.CIPHERS))
    @pytest.mark.parametrize("value", ["", "rot13", "xts,key-secret=source", "\udc80", "x" * 9999])
    def test_cipher_not_in_the_table_is_refused(self, name: str, value: str) -> None:
        """With the field, and in a form that can be sent."""
        asked = cipher(name, value)
        refused = refusal_of(dest("qcow2", encryption=asked))
        assert refused is not None
        assert dict(refused.values)["field"] == f"dest.encryption.{name}"
        assert len(refused.message) < 128

    @pytest.mark.parametrize(
        ("iter_time_ms", "expected"), [(0, False), (1, True), (60_000, True), (60_001, False)]
    )
    def test_key_derivation_time_is_limited_to_1_ms_to_1_minute(
        self,
        iter_time_ms: int,
        expected: bool,  # noqa: FBT001
    ) -> None:
        """Longer would be a way to keep the machine busy."""
        asked = values.DestinationEncryption(iter_time_milliseconds=iter_time_ms)
        assert (refusal_of(dest("luks", encryption=asked)) is None) is expected

    def test_encryption_defaults_are_those_of_nova_and_accepted(self) -> None:
        """And pass."""
        assert refusal_of(dest("luks", encryption=values.DestinationEncryption())) is None
        assert dataclasses.astuple(values.DestinationEncryption()) == (
            values.EncryptionFormat.LUKS,
            *("aes-256", "xts", "sha256", "plain64", "sha256"),
            2000,
        )


@pytest.mark.parametrize("kind", sorted(creation_options.OPTIONS))
def test_option_table_matches_the_options_of_qemu_img(kind: str) -> None:
    """By the same name: it is asked itself."""
    argv = ["qemu-img", "create", "-f", kind, "-o", "help"]
    output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    named = set(re.findall(r"^\s+([a-z0-9_]+)=", output, flags=re.MULTILINE))
    assert set(creation_options.OPTIONS[kind]) <= named


@pytest.mark.parametrize("name", sorted(creation_options.CIPHERS))
def test_encryption_table_matches_the_options_of_qemu_img(name: str) -> None:
    """By the same name, with dashes."""
    argv = ["qemu-img", "create", "-f", "luks", "-o", "help"]
    output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert f"{name.replace('_', '-')}=" in output
