"""Forked children, for what a process can't undo: filters, Landlock, identities, limits."""

from __future__ import annotations

import errno
import os
import pickle
import traceback
import warnings
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def in_child(act: Callable[[], T]) -> T:
    """Call `act` in a forked child, which ends afterwards, and give what it returned.

    An exception there fails the test, with its traceback; an ending signal raises
    ChildProcessError with the signal's number.
    """
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # pytest's watchdog is a second thread; the child has only the one that forked.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _answer(write_end, act)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        raise ChildProcessError(-status, "killed")
    done, value = pickle.loads(answer)  # noqa: S301 - our own child wrote it
    if not done:
        pytest.fail(value)
    result: T = value
    return result


def _answer(write_end: int, act: Callable[[], object]) -> None:
    answer: tuple[bool, object] = (False, "no answer")
    try:
        answer = (True, act())
    except BaseException:  # noqa: BLE001 - pytest.fail() is one, too
        answer = (False, traceback.format_exc())
    finally:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)


def errno_of(act: Callable[[], object]) -> str:
    """Give the name of the errno that a call ends with, or "done"."""
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"
