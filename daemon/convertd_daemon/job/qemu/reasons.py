"""Why qemu-img does not open an image, in fixed texts of ours.

Fails closed: qemu-img's own text never passes. An image can have it name other files, and say of
them whether they exist; so what it says counts only if all of it, behind the name that we gave, is
a sentence that names no other file.
"""

from __future__ import annotations

import re
from typing import Final

from convertd_core import values

REPLAY: Final = (
    r"vhdx image file 'PATH' opened read-only, but contains a log that needs to be replayed\s+"
    r"to replay the log, run:\s+qemu-img check -r all 'PATH'"
)
"""It goes on with a command for its own name of the file."""

VERSIONS: Final = (
    r"unsupported (qcow2|vmdk|vdi|parallels) version:? (0x)?[0-9a-f.]+"
    r"|unsupported version: 0x[0-9a-f]+|unsupported vdi image \(version [0-9.]+\)"
    r"|unsupported log version [0-9]+"
)

_REASONS: Final = tuple(
    (re.compile(pattern), phrase)
    for pattern, phrase in (
        (REPLAY, "its log must be replayed first, by a user who may write it"),
        ("image is dirty, replaying journal not supported", "its journal has to be replayed"),
        # The names of features are the image's own to choose.
        (
            r"unsupported (qcow2 feature\(s\)|qed features): [^\n]*",
            "it has features that this qemu-img does not know",
        ),
        (VERSIONS, "it is of a version that this qemu-img does not know"),
        (
            r"unsupported vdi image \(non-null (link|parent) uuid\)",
            "it is a snapshot or a difference: its data may be in other files",
        ),
        (
            "(qcow2: )?unknown compression type(: [0-9]+)?",
            "it is compressed in a way that this qemu-img does not know",
        ),
        ("unsupported encryption method [0-9]+", "it is encrypted in a way that is not known"),
        (
            r"unsupported (image|extent) type '[^'/\n]*'",
            "it is of a kind that this qemu-img does not read",
        ),
        ("l1 size too big|catalog too large", "its tables are larger than qemu-img reads"),
    )
)
"""What qemu-img says, in lower case, and what we say."""

_MISSING_MODULES: Final = (
    ("dmg-bzip2 module is missing", "bzip2"),
    ("dmg-lzfse module is missing", "lzfse"),
)
"""What it warns of, and how the image is compressed."""

IN_THE_LOG: Final = "the daemon's log has qemu-img's words"
MAX_OWN_CHARACTERS: Final = 200


def of_opening(stderr: str, path: str) -> str | None:
    """Our words for qemu-img's error about an image that it was given as `path`; None for none."""
    text = stderr.strip().lower().removeprefix(f"qemu-img: could not open '{path.lower()}': ")
    text = text.replace(f"'{path.lower()}'", "'PATH'")
    found = (phrase for pattern, phrase in _REASONS if pattern.fullmatch(text))
    return next(found, None)


def missing_module(stderr: str) -> str | None:
    """Which decompressor an image needs that this qemu-img lacks."""
    lower = stderr.lower()
    return next((name for phrase, name in _MISSING_MODULES if phrase in lower), None)


def unknown(stderr: str, place: values.Place) -> str:
    """The text for an error that is not known.

    A caller that converts with its own rights gets qemu-img's own words, for it may read every file
    that they mention. Other callers don't: the words are in the daemon's log.
    """
    lines = stderr.strip().splitlines()
    if place.root.access is not None or not lines:
        return IN_THE_LOG
    return f"it said {lines[-1][:MAX_OWN_CHARACTERS]!r}"
