"""Forked children, for what a process can't undo: filters, Landlock, identities, limits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import pickle
import traceback
import warnings
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        with logging_to_stderr():
            answer = (True, act())
    except BaseException:  # noqa: BLE001 - pytest.fail() is one, too
        answer = (False, traceback.format_exc())
    finally:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)


@contextlib.contextmanager
def logging_to_stderr(level: int | None = None) -> Iterator[None]:
    """Log to descriptor 2 and nowhere else; processes that are forked in the block still do.

    The test runner's own handlers write to descriptors that a child may have closed or given to
    others, and their locks and buffers are copied in whatever state they are.
    """
    root = logging.getLogger()
    before, handlers = root.level, root.handlers[:]
    with open(2, "w", closefd=False, encoding="utf-8") as stderr:
        root.handlers[:] = [logging.StreamHandler(stderr)]
        root.setLevel(before if level is None else level)
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(before)


def errno_of(act: Callable[[], object]) -> str:
    """Give the name of the errno that a call ends with, or "done"."""
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def no_new_privs() -> bool:
    """Whether no execve(2) of this process can grant privileges any more."""
    return bool(_prctl(39, None))  # PR_GET_NO_NEW_PRIVS


def pdeathsig() -> int:
    """The signal that this process gets when its parent ends; 0 for none."""
    number = ctypes.c_int()
    _prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    return number.value


def _prctl(operation: int, argument: object) -> int:
    """Ask, where /proc can't be read. Source: prctl(2), linux/prctl.h."""
    answer: int = ctypes.CDLL(None).prctl(operation, argument, None, None, None)
    assert answer >= 0
    return answer
