"""A confined program that is running, and its certain end."""

import contextlib
import os
import signal
from typing import Self


class ConfinedProgram:
    """A program that spawn() started; leaving the `with` block kills, reaps and closes.

    pidfd becomes readable when the program ends. stdout and stderr are read ends of pipes, close
    on exec and non-blocking. All three belong to this object and are closed by it.
    """

    __slots__ = ("_status", "pid", "pidfd", "stderr", "stdout")

    def __init__(self, *, pid: int, pidfd: int, stdout: int, stderr: int) -> None:
        """Take over an unreaped child process and its descriptors."""
        self.pid = pid
        self.pidfd = pidfd
        self.stdout = stdout
        self.stderr = stderr
        self._status: int | None = None

    def kill(self) -> None:
        """Send SIGKILL; a program that has ended already is no error.

        Raises:
            PermissionError: it has another uid, and we lack CAP_KILL.
        """
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end and give the exit status, or the ending signal as a negative number.

        Blocks; poll the pidfd first where that matters. A program in uninterruptible sleep does
        not end even when killed. Can be asked again.
        """
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as undo:
            for descriptor in (self.pidfd, self.stdout, self.stderr):
                undo.callback(os.close, descriptor)
            self.kill()
            # Reaped already, if a signal's handler raised between waitpid(2) and its answer.
            with contextlib.suppress(ChildProcessError):
                self.wait()
