"""Run the job program as a child process.

The job reads its request from a SOCK_SEQPACKET socket, its standard input, and sends its events
there. When our end closes, for any reason, the job ends and leaves nothing behind. SIGTERM ends it
too, except while it publishes: so its last event, or the lack of one, tells for certain whether the
result was published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, Self

from convertd_client import errors, results
from convertd_core import codec, messages, validation, values

MAX_MESSAGE_BYTES: Final = 1024 * 1024

MOST_SECRET_BYTES: Final = validation.MAX_PASSPHRASE_BYTES + 1
"""One more than the limit, so that the job detects a passphrase that is too long."""

GRACE_S: Final = 10.0
"""How long a stopped job may take to end. It takes milliseconds, unless a disk hangs."""

DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
"""The search path for programs when PATH is not set."""

# Python's -I ignores the environment, the working directory and the user's own packages. The job
# program is loaded by the path of its file, beside ours, not from sys.path.
_START: Final = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("convertd_daemon", sys.argv.pop())
package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module("convertd_daemon.job", run_name="__main__", alter_sys=True)
"""


class Job:
    """A running job program. Leaving the context ends it."""

    def __init__(
        self, request: bytes, timeout_s: float | None, secrets: tuple[bytes, ...] = ()
    ) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.timed_out = False
        self._channel, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there, contextlib.ExitStack() as stack:
            stack.callback(self._channel.close)
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [interpreter(), "-I", "-c", _START, _program()],
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                # Ctrl-C must reach only this process, which then ends the job.
                start_new_session=True,
            )
            self._channel.send(request)
            # In messages of their own: the request may be logged.
            for secret in secrets:
                self._channel.send(messages.PASSPHRASE + secret[:MOST_SECRET_BYTES])
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
            return
        self._process.kill()

    @property
    def status(self) -> int:
        """The program's exit status; to be read after its last event."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(GRACE_S)
        return 0

    def stop(self) -> None:
        """Tell the job to end. Its last events must still be read. Any thread may call this."""
        self._process.terminate()

    def events(self) -> Iterator[object]:
        """Yield the job's events until it closes the socket.

        After the timeout the job is stopped, and `timed_out` set.

        Raises:
            errors.ConvertError: the job failed.
            errors.OutcomeUnknown: it was stopped, but does not end.
        """
        while data := self._receive():
            event = codec.decode(data, *messages.FROM_JOB)
            if isinstance(event, messages.Failed):
                failure = event.failure
                raise errors.of_reason(failure.reason, failure.message, dict(failure.values))
            yield event

    def _receive(self) -> bytes:
        try:
            self._channel.settimeout(self._remaining_s())
            return self._channel.recv(MAX_MESSAGE_BYTES)
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
        # Not 0, which means not to wait at all.
        return max(self._deadline - time.monotonic(), 0.001)


class Conversion:
    """One conversion by the job program."""

    def __init__(self, request: bytes, secrets: tuple[bytes, ...]) -> None:
        self._request = request
        self._secrets = secrets
        self._job: Job | None = None
        self._cancelled = False
        self._plan: results.Plan | None = None

    def cancel(self) -> None:
        """Cancel the conversion. It may still succeed in `run`. Any thread may call this."""
        self._cancelled = True
        if self._job is not None:
            self._job.stop()

    def run(
        self, on_progress: Callable[[results.Progress], None] | None, timeout_s: float | None
    ) -> results.ConvertResult:
        """Convert, and wait for the end. May be called once.

        Raises:
            errors.ConvertError: see `errors`.
        """
        started = time.monotonic()
        with Job(self._request, timeout_s, self._secrets) as self._job:
            if self._cancelled:
                self._job.stop()
            for message in self._job.events():
                match message:
                    case messages.Succeeded(result=result):
                        return dataclasses.replace(result, plan=self._plan)
                    case messages.Planned(plan=plan):
                        self._plan = plan
                    case messages.Progressed(progress=progress) if on_progress is not None:
                        on_progress(self._completed(progress, time.monotonic() - started))
            raise self._unreported_end(self._job)

    def _completed(self, progress: results.Progress, elapsed_s: float) -> results.Progress:
        """The job's progress, with what the job does not add."""
        size = self._plan.virtual_size_bytes if self._plan else 0
        done = int(size * progress.percent / 100)
        return dataclasses.replace(
            progress, bytes_done=done, bytes_total=size, elapsed_seconds=elapsed_s
        )

    def _unreported_end(self, job: Job) -> errors.ConvertError:
        """The error for a job that ended without a last event."""
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


def encoded(request: values.ConvertRequest | values.InspectRequest) -> bytes:
    """The job's request in bytes. Passphrases are sent separately.

    Raises:
        errors.Unimplemented: there is no qemu-img.
    """
    return codec.encode(messages.LocalRequest(qemu_img=qemu_img(), request=request))


def inspect(request: bytes, timeout_s: float | None) -> results.ImageInfo:
    """Run a job program that inspects an image.

    Raises:
        errors.ConvertError: see `errors`.
    """
    with Job(request, timeout_s) as job:
        for message in job.events():
            if isinstance(message, messages.Inspected):
                return message.image
        if job.timed_out:
            raise errors.DeadlineExceeded("it took longer than its timeout", reason="TIMEOUT")
        raise _died(job)


def qemu_img() -> str:
    """The absolute path of qemu-img: the first on PATH, or else in /usr/bin.

    If PATH has an empty or relative entry, or is not set, execvp(3) and `shutil.which` search the
    working directory, where the owner of the images may have put a program. Here only absolute
    directories count.

    Raises:
        errors.Unimplemented: there is none.
    """
    listed = os.environ.get("PATH", DEFAULT_PATH).split(os.pathsep)
    directories = [directory for directory in (*listed, "/usr/bin") if os.path.isabs(directory)]
    found = shutil.which("qemu-img", path=os.pathsep.join(directories))
    if found is None:
        raise errors.unsupported("converting without a daemon", "there is no qemu-img here")
    return found


def interpreter() -> str:
    """The absolute path of the running Python interpreter.

    Raises:
        errors.Unimplemented: unknown, in a program that embeds Python. Source: sys.executable.
    """
    if not os.path.isabs(sys.executable or ""):
        raise errors.unsupported(
            "starting a process of its own", "this Python does not tell where its interpreter is"
        )
    return sys.executable


def _died(job: Job) -> errors.Internal:
    text = f"the conversion's process ended without an answer, with status {job.status}"
    return errors.Internal(text, reason="JOB_DIED", metadata={"status": str(job.status)})


def _program() -> str:
    """The file of the package with the job program, installed beside this package.

    sys.path is not searched: its first entry is often the working directory.

    Raises:
        errors.Unimplemented: it is not installed.
    """
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = os.path.join(beside, "convertd_daemon", "__init__.py")
    if not os.path.isfile(program):
        raise errors.unsupported("converting without a daemon", "convertd_daemon is not installed")
    return program
