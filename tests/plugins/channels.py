"""Channels on which descriptors are sent, as from the broker to the front."""

from __future__ import annotations

import socket

from convertd_daemon import channel


def passing() -> tuple[channel.Channel, channel.Channel]:
    """Both ends of one, neither of which refuses descriptors."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return channel.Channel(here), channel.Channel(there)
