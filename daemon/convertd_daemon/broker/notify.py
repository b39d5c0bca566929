"""Tell systemd how the service is. Source: sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger(__name__)


def notify(*assignments: str) -> None:
    """Send assignments such as READY=1 to the manager, if one asked for them.

    A manager that does not listen is no reason to stop serving: the failure is logged.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            log.warning("notify failed error=%s", error)


def ready() -> None:
    """The service serves, or has reloaded."""
    notify("READY=1")


def reloading() -> None:
    """The service reads its policy anew; `ready` or `status` follows."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """The service takes no more work."""
    notify("STOPPING=1")


def status(text: str) -> None:
    """One line for systemctl status."""
    notify(f"STATUS={text}")
