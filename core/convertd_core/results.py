"""What calls return: plain, frozen values, named as the contract names them.

The daemon or a job makes them, the front puts them into messages, and the client reads them from
a message or from its own job. Sizes are in bytes and times in seconds. An enum's UNSPECIFIED stands
for a value of a newer daemon that this client does not know.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from convertd_core import values

CacheMode = values.CacheMode
Compression = values.Compression
Preallocation = values.Preallocation
Phase = values.Phase
RootKind = values.RootKind
RootAccess = values.RootAccess
OverwriteScope = values.OverwriteScope
Limits = values.Limits


class Method(enum.StrEnum):
    """How a result gets its data."""

    UNSPECIFIED = "unspecified"
    REFLINK = "reflink"
    """It shares the source's blocks."""
    QEMU_IMG = "qemu-img"
    """qemu-img reads the source and writes the result."""
    COPY = "copy"
    """The daemon itself copies a small raw source. No program runs."""


class JobState(enum.StrEnum):
    """What a job is doing."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    UNKILLABLE = "unkillable"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChoice:
    """A cache mode, and in one sentence why it was chosen."""

    mode: CacheMode
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:  # noqa: A001 - the contract's name
    """What a caller should know although the call succeeded: for programs, and for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMember:
    """One image of a backing chain."""

    path: str
    format: str
    virtual_size_bytes: int
    actual_size_bytes: int
    encrypted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a conversion will be done, or was.

    `command` is for people to read: not fit to be run, nor to be parsed. `needed_bytes` is 0 where
    it can't be told or doesn't matter. `method_reason` says in one sentence why by that method.
    """

    source_format: str
    dest_format: str
    virtual_size_bytes: int
    dest_cache: CacheChoice
    source_cache: CacheChoice
    command: tuple[str, ...]
    chain: tuple[ImageMember, ...]
    compression: Compression
    needed_bytes: int
    available_bytes: int
    method: Method
    method_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a conversion is.

    `queue_position` counts the jobs that start before this one. `percent` reaches 100 before the
    result is on the disk. `bytes_total` is the virtual size, 0 until it is known. A job reports
    phase and percentage; the front, or the client without a daemon, adds the rest.
    """

    job_id: str = ""
    phase: Phase
    queue_position: int = 0
    percent: float = 0.0
    bytes_done: int = 0
    bytes_total: int = 0
    elapsed_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What was done.

    `published` is false for `validate_only` alone. `plan` is None only if the daemon sent none.
    `job_id` is empty for a conversion without a daemon. `shared_bytes` and `written_bytes` are the
    two parts of `allocated_size_bytes`: blocks that the source has too, and the result's own.
    """

    job_id: str = ""
    published: bool
    source_format: str
    dest_format: str
    virtual_size_bytes: int
    allocated_size_bytes: int
    dest_cache: CacheChoice
    source_cache: CacheChoice
    warnings: tuple[Warning, ...]
    elapsed_seconds: float
    queued_seconds: float = 0.0
    bytes_per_second: float
    verified: bool
    replaced: bool
    method: Method
    shared_bytes: int
    written_bytes: int
    plan: Plan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An internal snapshot of an image."""

    id: str
    name: str
    vm_state_size_bytes: int
    create_time: datetime.datetime | None
    vm_clock_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """A persistent dirty bitmap of an image."""

    name: str
    granularity_bytes: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What the sandboxed qemu-img reported of an image.

    `qemu_img_json` is its own answer (`qemu-img info --output=json`).
    """

    path: str
    format: str
    virtual_size_bytes: int
    actual_size_bytes: int
    cluster_size_bytes: int
    encrypted: bool
    dirty: bool
    corrupt: bool
    compressed: bool
    backing_filename: str
    backing_format: str
    backing_chain: tuple[ImageMember, ...]
    backing_chain_complete: bool
    snapshots: tuple[Snapshot, ...]
    bitmaps: tuple[Bitmap, ...]
    format_specific: Mapping[str, str]
    qemu_img_json: str
    warnings: tuple[Warning, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A conversion that waits or runs."""

    job_id: str
    uid: int
    source_path: str
    source_format: str
    dest_path: str
    dest_format: str
    state: JobState
    label: str
    progress: Progress
    create_time: datetime.datetime | None
    start_time: datetime.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedRoot:
    """A directory under which a grant allows something."""

    name: str
    path: str
    kind: RootKind
    access: RootAccess
    may_read: bool
    may_write: bool
    allow_is_zero: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One rule of the policy that names the caller. One must allow both ends of a conversion.

    `rule` is where it stands in the policy file.
    """

    rule: str
    roots: tuple[GrantedRoot, ...]
    read_formats: tuple[str, ...]
    write_formats: tuple[str, ...]
    overwrite: OverwriteScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The versions of what runs on the daemon's machine."""

    daemon: str
    qemu_img: str
    landlock_abi: int
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who the caller is, what the caller may do, and what the daemon can do."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    is_operator: bool
    grants: tuple[Grant, ...]
    limits: Limits
    versions: Versions
    source_formats: tuple[str, ...]
    dest_formats: tuple[str, ...]
    compressions: tuple[Compression, ...]
