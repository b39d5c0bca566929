"""Requests and grants: plain, frozen values.

Nothing here has an effect. A stage takes the values that the earlier stages made, so no stage can
be skipped: `connection → Peer → request → Grant → handles → images → plan → result`. What a
job finds out is in `convertd_daemon.job.stages`, what a call returns in `results`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

MIB: Final = 1024 * 1024

OVERFLOW_ID: Final = 65534
"""What the kernel reports for each id that our user namespace does not map."""

FORMATS: Final = frozenset(
    {"raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "luks", "dmg"}
)
"""The formats that convertd knows, by qemu's names. A policy allows some of them."""

WRITABLE_FORMATS: Final = FORMATS - {"dmg"}


# An enum's UNSPECIFIED stands for a value of a newer peer that this version does not know. Only the
# client's results have it: no decoder accepts it.


class CacheMode(enum.StrEnum):
    """How an image is opened with regard to the page cache, by qemu's names.

    `unsafe` is missing on purpose.
    """

    UNSPECIFIED = "unspecified"
    AUTO = "auto"
    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"


class Compression(enum.StrEnum):
    """How an image's clusters are compressed."""

    UNSPECIFIED = "unspecified"
    NONE = "none"
    DEFAULT = "default"
    ZLIB = "zlib"
    ZSTD = "zstd"


class Preallocation(enum.StrEnum):
    """How much of an image is reserved before it is written, by qemu's names."""

    UNSPECIFIED = "unspecified"
    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class Reflink(enum.StrEnum):
    """Whether a result may share blocks with its source, in the words of cp(1)."""

    UNSPECIFIED = "unspecified"
    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


class RootKind(enum.StrEnum):
    """What a root holds, and so what may be opened in it."""

    UNSPECIFIED = "unspecified"
    FILE = "file"
    BLOCK = "block"


class RootAccess(enum.StrEnum):
    """With whose rights the files of a root are opened."""

    UNSPECIFIED = "unspecified"
    DAEMON = "daemon"
    """The daemon's: a caller who is granted the root may read every file in it."""
    CALLER = "caller"
    """The caller's own uid, gid and groups, on top of the policy."""


class OverwriteScope(enum.StrEnum):
    """Which existing files a grant lets its users replace."""

    UNSPECIFIED = "unspecified"
    OWN = "own"
    ANY = "any"


class Phase(enum.StrEnum):
    """A part of a conversion, in the order in which a job goes through them."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    PREPARING = "preparing"
    CONVERTING = "converting"
    FLUSHING = "flushing"
    VERIFYING = "verifying"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who called connect(2), as the kernel reports it. The pid is for the log: it can be reused."""

    uid: int
    gid: int
    groups: frozenset[int]
    pid: int


class EncryptionFormat(enum.StrEnum):
    """A way in which images are encrypted."""

    UNSPECIFIED = "unspecified"
    LUKS = "luks"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEncryption:
    """That there is a passphrase: it goes from the front to the job, in no message."""

    format: EncryptionFormat = EncryptionFormat.LUKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The image to read, as the caller named it. An empty format means: find out, safely.

    `accept_damaged` takes an image whose reference counts are wrong, or that is marked as corrupt.
    """

    path: str
    format: str = ""
    encryption: SourceEncryption | None = None
    accept_damaged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationOption:
    """One creation option of a format, by qemu's name and in qemu's spelling."""

    name: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationEncryption:
    """How a result is encrypted, in qemu's terms. The passphrase is never here."""

    format: EncryptionFormat = EncryptionFormat.LUKS
    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    hash_alg: str = "sha256"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str = "sha256"
    iter_time_milliseconds: int = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The image to write, as the caller asked for it.

    `mode` None means the root's; `group` empty means what the root's owner or a setgid directory
    gives. `options` are of `format`.
    """

    path: str
    format: str
    compression: Compression = Compression.NONE
    preallocation: Preallocation = Preallocation.OFF
    mode: int | None = None
    group: str = ""
    overwrite: bool = False
    is_zero: bool = False
    encryption: DestinationEncryption | None = None
    options: tuple[CreationOption, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """One conversion, as asked. Nothing in it has been checked beyond its types."""

    source: Source
    dest: Destination
    cache_mode: CacheMode = CacheMode.AUTO
    verify: bool = False
    rate_limit_bytes_per_second: int = 0
    validate_only: bool = False
    label: str = ""
    reflink: Reflink = Reflink.AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectRequest:
    """A request to inspect an image."""

    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose the files are that are created in a root."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryIdentity:
    """Which directory it is, whatever its name. `born_ns` is 0 where the file system says nothing.

    A device's number can be another after a remount, and an inode's number can be used again: so
    the time at which it was made decides, where it is known. That it differs says something only
    with `keeps_birth`: on overlayfs a directory that is changed for the first time is made anew
    under its old number, and on SMB its owner may set the time. There the device's number decides.
    """

    device: int
    inode: int
    born_ns: int = 0
    keeps_birth: bool = False

    def is_same(self, other: DirectoryIdentity) -> bool:
        """Whether both are, or must be taken for, one directory."""
        if self.inode != other.inode:
            return False
        if self.born_ns and other.born_ns:
            if self.born_ns == other.born_ns:
                return True
            if self.keeps_birth and other.keeps_birth:
                return False
        return self.device == other.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A directory that the policy opens to callers, and how.

    `path` is absolute and normal, without a trailing slash. `access` None means the rights that the
    process has, without a daemon: no policy can state it. `owner` None means the caller. `mounts`
    allows mount points below the root to be crossed, `allow_ownerless` results on file systems that
    do not keep their owner or mode, `reflink` results that share blocks with images in the root,
    and results in the root that share them with their sources. `parent_uids` and `parent_gids` are
    the users and groups, beside root, who may be able to write a directory above the root.

    `identity` is the directory that had this path when the policy was loaded, None if none had.
    `aliases` are the roots whose directory was then on the way to this one, or was this one: by a
    bind mount, or because they are around it.
    """

    name: str
    path: str
    kind: RootKind = RootKind.FILE
    access: RootAccess | None
    owner: Owner | None = None
    mode: int = 0o600
    mounts: bool = False
    allow_ownerless: bool = False
    allow_is_zero: bool = False
    accept_damaged: bool = False
    reflink: bool = True
    parent_uids: frozenset[int] = frozenset()
    parent_gids: frozenset[int] = frozenset()
    identity: DirectoryIdentity | None = None
    aliases: frozenset[str] = frozenset()

    def contains(self, path: str) -> bool:
        """Whether a path lies below the root, by name."""
        return path.startswith(f"{self.path.rstrip('/')}/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A path that the policy allows: a root, and the way below it (never empty, never `..`).

    `others` are all other roots of the policy: the way must not meet one of them.
    """

    root: Root
    below: str
    others: tuple[Root, ...] = ()

    @property
    def path(self) -> str:
        """The path as the caller wrote it, for messages. Never opened."""
        return f"{self.root.path.rstrip('/')}/{self.below}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the policy bounds. Sizes in bytes, times in seconds."""

    jobs: int
    jobs_per_user: int
    queue: int
    queue_per_user: int
    inspections: int
    inspections_per_user: int
    connections: int
    connections_per_user: int
    virtual_size_bytes: int
    memory_bytes: int
    stall_seconds: float
    duration_seconds: float
    inspect_seconds: float


DEFAULT_LIMITS: Final = Limits(
    jobs=4,
    jobs_per_user=2,
    queue=64,
    queue_per_user=32,
    inspections=8,
    inspections_per_user=4,
    connections=1024,
    connections_per_user=128,
    virtual_size_bytes=2 * 1024**4,
    memory_bytes=1024**3,
    stall_seconds=600.0,
    duration_seconds=24 * 3600.0,
    inspect_seconds=30.0,
)
"""The limits that a policy does not state, and those without a daemon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The policy's settings of the service. Empty and 0: off."""

    metrics: str = ""
    idle_exit_s: float = 0.0
    stop_grace_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceGrant:
    """Permission to read one image, and the rule that gave it.

    Only `policy.decide` makes one (and `local`, for the caller's own rights), so nothing needs to
    be checked again. The formats are what the rule allows: the source's is judged once more when
    it is known. Of a path that an image names, the longest root in `readable` and `closed` that
    contains it decides, and must be one of `readable`.
    """

    rule: str
    peer: Peer
    source: Place
    readable: tuple[Root, ...]
    read_formats: frozenset[str]
    limits: Limits
    closed: tuple[Root, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertGrant(SourceGrant):
    """Permission to convert it, and to write the result."""

    request: ConvertRequest
    dest: Place
    overwrite: OverwriteScope


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectGrant(SourceGrant):
    """Permission to inspect it."""

    request: InspectRequest


Grant = ConvertGrant | InspectGrant
