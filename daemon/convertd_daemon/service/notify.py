"""Notify systemd of the service's state. Source: sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Final

PATIENCE_S: Final = 1.0
"""How long to wait for systemd to take a message."""

log = logging.getLogger(__name__)


def notify(*assignments: str, patience_s: float = PATIENCE_S) -> None:
    """Send assignments such as READY=1 to the manager, if one asked for them.

    A manager that does not listen is no reason to stop serving: the failure is logged. Nor is one
    that does not read: a datagram socket takes ten messages (net.unix.max_dgram_qlen), and then
    send(2) would wait for ever.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(patience_s)
        try:
            sock.sendto("\n".join(assignments).encode(), address)
        except BlockingIOError:
            log.debug("systemd reads no messages, dropped assignments=%s", " ".join(assignments))
        except OSError as error:
            log.warning("can't notify systemd error=%s", error)


def ready() -> None:
    """The service serves requests, or has reloaded."""
    notify("READY=1")


def reloading() -> None:
    """The service reads its policy anew; `ready` or `status` follows."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(limit_s: float) -> None:
    """The service takes no more work, and may take this long to stop, whatever the unit sets."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(limit_s * 1e6)}")


def watchdog() -> None:
    """Ping the watchdog."""
    notify("WATCHDOG=1")


def status(text: str) -> None:
    """One line for systemctl status. Dropped if the manager is behind: a newer one follows."""
    notify(f"STATUS={text}", patience_s=0.0)
