"""System calls that fail as no file system here makes them fail."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def o_tmpfile(name: str) -> Iterator[None]:
    """Let open(2) fail with this errno wherever O_TMPFILE is asked for."""
    number, original = getattr(errno, name), os.open

    def call(path: Any, flags: int, *more: Any, **options: Any) -> int:  # noqa: ANN401 - as they come
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return original(path, flags, *more, **options)

    with mock.patch.object(os, "open", call):
        yield
