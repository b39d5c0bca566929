"""What every test has."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

pytest_plugins = ("forbid_skips", "properties", "harness.fixtures", "pytester")


def pytest_configure() -> None:
    """Take Ctrl-C seriously, and so have our programs: a shell's background jobs ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the machines that boot: of several at work, none is to be left with them alone."""
    items.sort(key=lambda item: "units" not in item.path.parts)
