"""Damage to an image that leaves what a guest wrote where it is, and who may accept it.

Fails closed. A host that crashed leaves a qcow2 with wrong reference counts, or marked as corrupt:
writing to it could destroy data, but reading it gives all of it. An image counts as such
only where every complaint of `qemu-img check` is one of a count that is too high, or 0, or of a
flag that says the same. What is missing in the file, and what two tables claim, is never accepted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values

if TYPE_CHECKING:
    from convertd_daemon.job.files.opened_source import Source
    from convertd_daemon.job.stages import ProbedImage

MARKED: Final = "it is marked as corrupt"
COUNTS: Final = "its reference counts are wrong, as qemu-img check tells"

_HARMLESS: Final = re.compile(
    # A cluster that is used once, or not at all, whatever its count says. One that is used twice
    # may hold the data of one of the two.
    r"(ERROR|Leaked) cluster \d+ refcount=\d+ reference=[01]"
    r"|ERROR OFLAG_COPIED (data|L2) cluster: l[12](_index=\d+ l1)?_entry=[0-9a-f]+ refcount=\d+"
)
"""All that a line may say. Source: qemu block/qcow2-refcount.c."""

LONGEST_LINE_BYTES: Final = 4096
"""No line of a `check` comes near it."""

_SUMMARY: Final = re.compile(
    r"|No errors were found on the image\."
    r"|\d+ errors were found on the image\."
    r"|Data may be corrupted, or further writes to the image may corrupt it\."
    r"|\d+ leaked clusters were found on the image\."
    r"|This means waste of disk space, but no harm to data\."
)


class Complaints:
    """What `check` complains of, judged line by line as it comes: there may be one a cluster."""

    def __init__(self) -> None:
        self._cut = b""
        self._found = False
        self._harmless = True

    def take(self, data: bytes) -> None:
        """Take a piece of what it says."""
        *lines, self._cut = (self._cut + data).split(b"\n")
        for line in lines:
            self._judge(line)
        if len(self._cut) > LONGEST_LINE_BYTES:
            self._harmless = False
            self._cut = b""

    def are_harmless(self) -> bool:
        """Whether there were any, and all of them leave the data where it is. Ask at the end."""
        self._judge(self._cut)
        self._cut = b""
        return self._found and self._harmless

    def _judge(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        if not _SUMMARY.fullmatch(text):
            self._found = True
            self._harmless &= _HARMLESS.fullmatch(text) is not None


def check_mark(asked: values.Source, source: Source, info: ProbedImage) -> None:
    """Judge an image that says of itself that it is corrupt.

    Raises:
        conditions.ImageDamaged, conditions.DamageNotAllowed: as `accept` says.
    """
    if info.corrupt:
        accept(asked, source, MARKED)


def accept(asked: values.Source, source: Source, problem: str) -> None:
    """Go on with a damaged image, if that was asked for and its root allows it.

    Raises:
        conditions.ImageDamaged: it was not asked for.
        conditions.DamageNotAllowed: it was, and the policy does not allow it.
    """
    path = source.place.path
    if not asked.accept_damaged:
        raise conditions.ImageDamaged(path=path, problem=problem)
    if not source.place.root.accept_damaged:
        raise conditions.DamageNotAllowed(path=path, problem=problem)


def warning(path: str, problem: str) -> results.Warning:
    """What a result says of such a source."""
    return results.Warning(
        reason="SOURCE_DAMAGED", message=f"{path}: {problem}; it was read as it is"
    )
