"""What the attacks share: a secret, and images of the caller's that name it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import waiting
from hostile import secret as secrets
from hostile.secret import Secret


@pytest.fixture(scope="module")
def secret(scratch: Path) -> Iterator[Secret]:
    """A file that must never be read. Nobody may have written to it either."""
    one = secrets.made(scratch / "secret")
    server = secrets.served(one)
    yield one
    server.terminate()
    server.wait(waiting.DEADLINE_S)
    assert one.unchanged()
