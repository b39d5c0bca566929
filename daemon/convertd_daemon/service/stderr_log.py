"""The daemon's log on stderr, which systemd takes into the journal, line by line."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _Prioritized(logging.Formatter):
    """Begins each line with its priority. Source: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, with the prefix before each of its lines."""
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


def log_to_it(level: int) -> None:
    """Log to stderr; with priorities, if stderr is the journal."""
    handler = logging.StreamHandler(sys.stderr)
    if _is_journal():
        # Time, name and pid are the journal's own.
        handler.setFormatter(_Prioritized("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s[%(process)d] %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _is_journal() -> bool:
    """Whether stderr is the stream that JOURNAL_STREAM names. Source: systemd.exec(5)."""
    status = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
