"""convertctl, the daemon's command-line client."""

from __future__ import annotations

import os
import sys
from typing import Final, NoReturn

INTERRUPTED: Final = 130
"""The exit status after Ctrl-C: 128 and the signal's number."""


def main() -> NoReturn:
    """Run convertctl.

    Modules are imported when they are needed: a completion must not take half a second.
    """
    # convertctl reports a lost connection itself.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        from convertd_client.cli import commands  # noqa: PLC0415 - Ctrl-C may come this early

        sys.exit(commands.run())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
