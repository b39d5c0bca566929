"""What a caller asks for, brought into one form: the same with a daemon and without.

Only what can't be said to a daemon at all is refused here; the rest is for the daemon to judge,
so that there is one judge.
"""

from __future__ import annotations

import enum
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypedDict, TypeVar, cast

from convertd_client import errors
from convertd_core import creation_options, values

Path = str | os.PathLike[str]

Choice = TypeVar("Choice", bound=enum.StrEnum)

_LARGEST: Final = {"mode": 2**32 - 1, "rate_limit": 2**64 - 1}
"""What the contract's fields hold."""


class ConvertOptions(TypedDict, total=False):
    """The options of a conversion. One that is left out has the default stated here."""

    source_format: str | None
    """qemu's name of the source's format. None: found out in the sandbox. State it if you can."""
    compress: bool
    """Compress the result, as the policy says (zlib if it says nothing). False."""
    compression: str | None
    """`zlib` or `zstd`: compress the result so. None: as `compress` says."""
    cache_mode: str
    """`auto`, `none`, `writeback`, `writethrough` or `directsync`. `auto`: what the destination
    can do. Whatever the mode, the result is on the disk when the call returns."""
    reflink: str
    """`auto`: share blocks with the source if possible, else copy. `never`: copy. `always`: share
    blocks, or fail. `auto`."""
    preallocation: str | None
    """`off`, `metadata`, `falloc` or `full`. None: `off`."""
    mode: int | None
    """The file's permission bits, within 0o666. None: what the policy's root says."""
    group: str | None
    """The file's group, by name or number; one of the caller's. None: the caller's own."""
    overwrite: bool
    """Replace an existing file, in one step. False: it must not exist."""
    verify: bool
    """Read the result back and compare it with the source before it is published. False."""
    rate_limit: int | None
    """The most that is read from the source, in bytes per second, at least 1 MiB. None: no
    limit."""
    label: str
    """Your own name for the job, shown in the job list and in the log. Empty."""
    validate_only: bool
    """Do every check, plan the work, and do nothing. False."""
    source_secret: bytes | None
    """The passphrase of an encrypted source. None: it is not encrypted."""
    dest_secret: bytes | None
    """The passphrase to encrypt the result with. None: it is not encrypted."""
    accept_damaged: bool
    """Take a qcow2 that is marked as corrupt, or whose reference counts are wrong, if all its data
    is there. False. The policy must allow it."""
    is_zero: bool
    """The destination is a device that reads as zeroes throughout. False. The policy must allow
    the claim."""

    # What follows is for some formats, and of qemu's choice where it is None.
    cluster_size: int | None
    """Of `qcow2`, `qed` and `parallels`: bytes in a cluster."""
    compat: str | None
    """Of `qcow2`: `0.10` or `1.1`, the version of the format."""
    lazy_refcounts: bool | None
    """Of `qcow2`: postpone updates of reference counts."""
    refcount_bits: int | None
    """Of `qcow2`: bits of a reference count, a power of two up to 64."""
    extended_l2: bool | None
    """Of `qcow2`: use subclusters."""
    subformat: str | None
    """Of `vmdk`: `monolithicSparse` or `streamOptimized`; of `vpc` and `vhdx`: `dynamic` or
    `fixed`."""
    adapter_type: str | None
    """Of `vmdk`: `ide`, `lsilogic`, `buslogic` or `legacyESX`."""
    hwversion: int | None
    """Of `vmdk`: the virtual hardware's version, 1 to 99."""
    zeroed_grain: bool | None
    """Of `vmdk`: mark zeroes by grain-table entries."""
    static: bool | None
    """Of `vdi`: allocate every block beforehand."""
    block_size: int | None
    """Of `vhdx`: bytes in a block."""
    log_size: int | None
    """Of `vhdx`: bytes of the log."""
    table_size: int | None
    """Of `qed`: clusters in a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One conversion, as it will be asked for, and its passphrases. Only `asked` makes one."""

    request: values.ConvertRequest
    source_secret: bytes | None = field(repr=False)
    dest_secret: bytes | None = field(repr=False)

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """The passphrases that there are, the source's first."""
        return tuple(item for item in (self.source_secret, self.dest_secret) if item is not None)


def asked(source: Path, dest: Path, dest_format: str, options: ConvertOptions) -> Conversion:
    """Bring the arguments of `convert` into form.

    Raises:
        errors.InvalidArgument: an option has no such value, or a path is not valid Unicode.
        TypeError: there is no such option.
    """
    unknown = options.keys() - ConvertOptions.__optional_keys__
    if unknown:
        raise TypeError(f"convert() has no option {min(unknown)!r}")
    source_secret, dest_secret = options.get("source_secret"), options.get("dest_secret")
    request = values.ConvertRequest(
        source=values.Source(
            path=path_text("source.path", source),
            format=_text("source.format", options.get("source_format") or ""),
            encryption=None if source_secret is None else values.SourceEncryption(),
            accept_damaged=options.get("accept_damaged", False),
        ),
        dest=values.Destination(
            path=path_text("dest.path", dest),
            format=_text("dest.format", dest_format),
            encryption=None if dest_secret is None else values.DestinationEncryption(),
            compression=_compression(options),
            preallocation=_choice(
                "dest.preallocation", options.get("preallocation") or "off", values.Preallocation
            ),
            mode=_bounded("mode", options.get("mode")),
            group=_text("dest.group", options.get("group") or ""),
            overwrite=options.get("overwrite", False),
            is_zero=options.get("is_zero", False),
            options=_created(dest_format, options),
        ),
        cache_mode=_choice("cache_mode", options.get("cache_mode", "auto"), values.CacheMode),
        verify=options.get("verify", False),
        rate_limit_bytes_per_second=_bounded("rate_limit", options.get("rate_limit")) or 0,
        validate_only=options.get("validate_only", False),
        label=_text("label", options.get("label", "")),
        reflink=_choice("reflink", options.get("reflink", "auto"), values.Reflink),
    )
    return Conversion(request=request, source_secret=source_secret, dest_secret=dest_secret)


def path_text(name: str, path: Path) -> str:
    """A path as text that the contract can carry.

    Raises:
        errors.InvalidArgument: it holds bytes that are not UTF-8.
    """
    text = os.fspath(path)
    if not _is_unicode(text):
        metadata = {"field": name, "path": ascii(text), "problem": "is not valid UTF-8"}
        message = f"{name}: {text!a} is not valid UTF-8"
        raise errors.InvalidArgument(message, reason="BAD_PATH", metadata=metadata)
    return text


def absolute(path: Path) -> str:
    """A path made absolute against the working directory, without following any link.

    getcwd(3) gives a path without links, so `..` at a path's beginning can be resolved by its
    text. One that comes later can't, and stays for the reader to refuse.

    Raises:
        errors.InvalidArgument: the path is empty, or there is no working directory any more.
    """
    text = os.fspath(path)
    if not text:
        raise bad_option("path", "is empty")
    names = [name for name in text.split("/") if name not in {"", "."}]
    if text.startswith("/"):
        return "/" + "/".join(names)
    try:
        base = os.getcwd()
    except FileNotFoundError as error:
        raise bad_option("path", "is relative, and the working directory is gone") from error
    while names[:1] == [".."]:
        base, names = posixpath.dirname(base), names[1:]
    return posixpath.join(base, *names)


def bad_option(name: str, problem: str) -> errors.InvalidArgument:
    """The error for an option that has no such value."""
    metadata = {"field": name, "problem": problem}
    return errors.InvalidArgument(f"{name}: {problem}", reason="BAD_OPTION", metadata=metadata)


def _compression(options: ConvertOptions) -> values.Compression:
    stated = options.get("compression")
    if stated is not None:
        return _choice("dest.compression", stated, values.Compression)
    return values.Compression.DEFAULT if options.get("compress") else values.Compression.NONE


def _created(dest_format: str, options: ConvertOptions) -> tuple[values.CreationOption, ...]:
    """The options of the result's format that are asked for, checked as far as need be."""
    given: Mapping[str, object] = options
    found: list[values.CreationOption] = []
    for name in sorted(creation_options.NAMES & given.keys()):
        value = given[name]
        if value is None or value == 0:
            continue
        kind = creation_options.OPTIONS.get(dest_format, {}).get(name)
        field_name = f"dest.{dest_format}.{name}"
        if kind is None:
            raise bad_option(field_name, "the format has no such option")
        problem = kind.problem_of(value)
        if problem:
            raise bad_option(field_name, problem)
        text = creation_options.qemu_value(cast("creation_options.Value", value))
        found.append(values.CreationOption(name=name, value=text))
    return tuple(found)


def _choice(name: str, value: str, kind: type[Choice]) -> Choice:
    if value != "unspecified" and value in set(kind):
        return kind(value)
    possible = ", ".join(item for item in kind if item != "unspecified")
    raise bad_option(name, f"{value!r} is not one of {possible}")


def _bounded(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value <= _LARGEST[name]:
        raise bad_option(name, f"{value} is not between 0 and {_LARGEST[name]}")
    return value


def _text(name: str, text: str) -> str:
    if not _is_unicode(text):
        raise bad_option(name, f"{text!a} is not valid Unicode")
    return text


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, as names of undecodable bytes have in Python."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
