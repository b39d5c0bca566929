"""The job program as a child of ours: started, listened to, ended.

It is told by one message on a SOCK_SEQPACKET socket, its standard input, and answers there. The
socket is also its life: when our end closes, by whatever cause, the job ends and leaves nothing.
SIGTERM ends it too, except while it publishes: so what it says last, or that it says nothing,
tells for certain whether the result is there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, Self

from convertd_client import errors, job_protocol, results

MAX_MESSAGE_BYTES: Final = 1024 * 1024

MAX_SECRET_BYTES: Final = 4097
"""One more than is allowed, so that the job sees a passphrase that is too long."""

_PASSPHRASE: Final = b"P"
"""What a passphrase begins with on its way, so that an empty one is not the end."""

GRACE_S: Final = 10.0
"""How long a job may take to end when it is told to. It takes milliseconds, unless a disk hangs."""

DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
"""Where programs are looked for when PATH is not set."""

# Python's -I leaves out the environment, the working directory and the user's own packages. The
# program is the one beside us, whichever else could be found: its package is loaded by its file.
_START: Final = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("convertd_daemon", sys.argv.pop())
package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module("convertd_daemon.job", run_name="__main__", alter_sys=True)
"""


class Job:
    """A job program that runs. Ends with the context, if it has not ended by then."""

    def __init__(
        self, told: bytes, timeout_s: float | None, secrets: tuple[bytes, ...] = ()
    ) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.timed_out = False
        self._line, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there, contextlib.ExitStack() as stack:
            stack.callback(self._line.close)
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [interpreter(), "-I", "-c", _START, _program()],
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                # Ctrl-C is for us: we end the job, and see how it ended.
                start_new_session=True,
            )
            self._line.send(told)
            # Of their own, and not in the message, which may be logged.
            for secret in secrets:
                self._line.send(_PASSPHRASE + secret[:MAX_SECRET_BYTES])
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
            return
        self._process.kill()

    @property
    def status(self) -> int:
        """The program's exit status, once it said its last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(GRACE_S)
        return 0

    def stop(self) -> None:
        """Tell the job to end. What it still says is to be read. For any thread."""
        self._process.terminate()

    def events(self) -> Iterator[tuple[str, job_protocol.Fields]]:
        """What the job says, until it says no more.

        When the time is over the job is stopped, and `timed_out` set.

        Raises:
            errors.OutcomeUnknown: it was stopped, and does not end.
        """
        while data := self._receive():
            yield job_protocol.event(data)

    def _receive(self) -> bytes:
        try:
            self._line.settimeout(self._remaining_s())
            return self._line.recv(MAX_MESSAGE_BYTES)
        except ConnectionResetError:
            return b""
        except TimeoutError:
            if self.timed_out:
                text = "the conversion was stopped, but does not end: a disk may hang"
                raise errors.OutcomeUnknown(text, reason="UNKILLABLE") from None
        self.timed_out = True
        self._deadline = time.monotonic() + GRACE_S
        self.stop()
        return self._receive()

    def _remaining_s(self) -> float | None:
        if self._deadline is None:
            return None
        # Not 0, which would be "do not wait at all".
        return max(self._deadline - time.monotonic(), 0.001)


class Conversion:
    """One conversion by a job program."""

    def __init__(self, told: bytes, secrets: tuple[bytes, ...]) -> None:
        self._told = told
        self._secrets = secrets
        self._job: Job | None = None
        self._cancelled = False
        self._plan: results.Plan | None = None

    def cancel(self) -> None:
        """Have the conversion end. `run` says whether that came too late. For any thread."""
        self._cancelled = True
        if self._job is not None:
            self._job.stop()

    def run(
        self, on_progress: Callable[[results.Progress], None] | None, timeout_s: float | None
    ) -> results.ConvertResult:
        """Convert, and wait for the end. Once.

        Raises:
            errors.ConvertError: it was not done.
        """
        started = time.monotonic()
        with Job(self._told, timeout_s, self._secrets) as self._job:
            if self._cancelled:
                self._job.stop()
            for name, fields in self._job.events():
                if name == "Succeeded":
                    return job_protocol.result(fields)
                if name == "Failed":
                    raise job_protocol.failure(fields)
                if name == "Planned":
                    self._plan = job_protocol.plan(fields)
                elif name == "Progressed" and on_progress is not None:
                    size = self._plan.virtual_size_bytes if self._plan else 0
                    on_progress(job_protocol.progress(fields, size, time.monotonic() - started))
            raise self._silence(self._job)

    def _silence(self, job: Job) -> errors.ConvertError:
        """Why a job ended without saying how."""
        if self._cancelled:
            text = "the job was cancelled; nothing was published"
            return errors.Cancelled(text, reason="CANCELLED_BY_CALLER")
        if job.timed_out:
            text = "the conversion took longer than its timeout, and was stopped"
            return errors.DeadlineExceeded(text, reason="TIMEOUT")
        if self._plan is None:
            return _died(job)
        text = "the conversion's process died: whether the conversion was done is not known"
        return errors.OutcomeUnknown(text, reason="JOB_DIED")


def inspect(path: str, told: bytes, timeout_s: float | None) -> results.ImageInfo:
    """Have a job program look at an image.

    Raises:
        errors.ConvertError: it could not.
    """
    with Job(told, timeout_s) as job:
        for name, fields in job.events():
            if name == "Inspected":
                return job_protocol.image(path, fields)
            if name == "Failed":
                raise job_protocol.failure(fields)
        if job.timed_out:
            raise errors.DeadlineExceeded("it took longer than its timeout", reason="TIMEOUT")
        raise _died(job)


def qemu_img() -> str:
    """The qemu-img to run, by its absolute path: the first on PATH, or else in /usr/bin.

    Where PATH has an empty or relative entry, or is not set, execvp(3) and `shutil.which` look in
    the working directory, which may hold a program of whoever made the images there. Here only
    absolute directories count.

    Raises:
        errors.Unimplemented: there is none.
    """
    listed = os.environ.get("PATH", DEFAULT_PATH).split(os.pathsep)
    directories = [directory for directory in (*listed, "/usr/bin") if os.path.isabs(directory)]
    found = shutil.which("qemu-img", path=os.pathsep.join(directories))
    if found is None:
        raise job_protocol.unsupported("converting without a daemon", "there is no qemu-img here")
    return found


def interpreter() -> str:
    """The Python that runs us, by its absolute path.

    Raises:
        errors.Unimplemented: a program that embeds Python may not tell. Source: sys.executable.
    """
    if not os.path.isabs(sys.executable or ""):
        raise job_protocol.unsupported(
            "starting a process of its own", "this Python does not tell where its interpreter is"
        )
    return sys.executable


def _died(job: Job) -> errors.Internal:
    text = f"the conversion's process ended without a word, with status {job.status}"
    return errors.Internal(text, reason="JOB_DIED", metadata={"status": str(job.status)})


def _program() -> str:
    """The file of the package that has the job program: the one installed with this package.

    Never looked up in sys.path, whose first entry is often the working directory.

    Raises:
        errors.Unimplemented: it is not installed.
    """
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = os.path.join(beside, "convertd_daemon", "__init__.py")
    if not os.path.isfile(program):
        raise job_protocol.unsupported(
            "converting without a daemon", "convertd_daemon is not installed"
        )
    return program
