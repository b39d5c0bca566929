"""A real daemon: the installed command, as root, with a policy and a socket of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from policies import Policy

from harness import processes, programs, waiting
from harness.agent import Agent
from harness.callers import Caller
from harness.processes import Process

COMMAND: Final = programs.CONVERTD

FRONT: Final = "convertd-front"
JOB: Final = "convertd-job"
PREFORKED_JOB: Final = "convertd-idle"
QEMU_IMG: Final = "qemu-img"

LIVE: Final[set[Daemon]] = set()
"""Daemons whose log is worth reading when a test fails."""


class DidNotStart(Exception):
    """The daemon ended before it served."""

    def __init__(self, status: int, output: str) -> None:
        super().__init__(f"exit status {status}: {output}")
        self.status = status
        self.output = output


class Daemon:
    """One daemon's home (policy, socket, log), and its process while it runs.

    The home is below /run and root's alone to write, as a policy's must be. The process leads a
    session, so that whatever it ever started can be told from everything else.
    """

    def __init__(self, policy: Policy | str) -> None:
        """Write the policy. `start` starts the daemon."""
        self.home = Path(tempfile.mkdtemp(prefix="convertd-test-", dir="/run"))
        self.home.chmod(0o755)
        self.socket = self.home / "convertd.sock"
        self.private = self.home / "convertd.sock.private"
        self.log_path = self.home / "log"
        self.policy_path = self.home / "policy.toml"
        self.policy_path.write_text(str(policy), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self._notified: socket.socket | None = None
        self._agents: dict[Caller, Agent] = {}
        LIVE.add(self)

    @property
    def pid(self) -> int:
        """The broker's."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the broker was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it and all of its processes wrote to standard error."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(
        self,
        *,
        wrapper: tuple[str, ...] = (),
        pass_fds: tuple[int, ...] = (),
        options: tuple[str, ...] = ("--verbose",),
    ) -> None:
        """Start, and wait until it serves: it says so as it would to systemd.

        `wrapper` is a program with arguments that executes the daemon in its own place.

        Raises:
            DidNotStart: it ended instead.
        """
        if self._notified is not None:
            self._notified.close()
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = self.home / "notify"
        address.unlink(missing_ok=True)
        manager.bind(str(address))
        manager.setblocking(False)
        self._notified = manager
        argv = [str(COMMAND), "--policy", str(self.policy_path), "--socket", str(self.socket)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*wrapper, *argv, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(address)},
                pass_fds=pass_fds,
                start_new_session=True,
            )
        self.await_notice("READY=1")
        self.await_one(PREFORKED_JOB)

    def await_notice(self, notice: str, deadline_s: float = waiting.DEADLINE_S) -> None:
        """Wait until it tells its manager something.

        Raises:
            DidNotStart: it ended instead.
        """
        waiting.until(lambda: self._notices(notice), f"the daemon says {notice}", deadline_s)

    def _notices(self, notice: str) -> bool:
        assert self._process is not None
        assert self._notified is not None
        try:
            while notice not in self._notified.recv(4096).decode().splitlines():
                pass
        except BlockingIOError:
            status = self._process.poll()
            if status is not None:
                raise DidNotStart(status, self.log) from None
            return False
        return True

    def _forget_notices(self) -> None:
        assert self._notified is not None
        with contextlib.suppress(BlockingIOError):
            while self._notified.recv(4096):
                pass

    # --- its callers -------------------------------------------------------------------------

    def agent(self, caller: Caller) -> Agent:
        """The process with which a user calls it, started when first asked for."""
        if caller not in self._agents:
            self._agents[caller] = Agent(caller, self.socket, self.log_path)
        return self._agents[caller]

    def kill_agent(self, caller: Caller) -> None:
        """Kill a user's process."""
        self._agents.pop(caller).kill()

    # --- its processes -----------------------------------------------------------------------

    def processes(self, name: str = "") -> list[Process]:
        """Its processes that live, or those of that name."""
        found = processes.of_session(self.pid)
        return [one for one in found if not one.is_over and name in {"", one.name}]

    def await_one(self, name: str) -> int:
        """Wait until there is one process of that name, and no other, and give its pid."""
        return waiting.until(lambda: self._one(name), f"one process {name}")

    def _one(self, name: str) -> int:
        found = self.processes(name)
        return found[0].pid if len(found) == 1 else 0

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[int]:
        """Stop the one process of that name for the length of the block."""
        pid = self.await_one(name)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)

    def await_none(self, name: str) -> None:
        """Wait until no process of that name is left."""
        waiting.until(lambda: not self.processes(name), f"no process {name}")

    def await_idle(self) -> None:
        """Wait until there is nothing but broker, front, and what is forked for the next job.

        A job that has ended holds its place, and its destination, until the broker has noticed.
        """
        waiting.until(lambda: not self._at_work(), "no job, and none that was not waited for")
        self.await_one(PREFORKED_JOB)

    def _at_work(self) -> list[Process]:
        found = processes.of_session(self.pid)
        return [one for one in found if one.name in {JOB, QEMU_IMG}]

    def traced(self) -> tuple[int, ...]:
        """What to trace to see all jobs: the broker, which forks them, and what is forked ahead."""
        return self.pid, self.await_one(PREFORKED_JOB)

    def await_logged(self, text: str) -> None:
        """Wait until the log has that text."""
        waiting.until(lambda: text in self.log, f"the log has {text!r}")

    # --- its end -----------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        """Signal the broker. What it said to its manager before is forgotten."""
        self._forget_notices()
        os.kill(self.pid, number)

    def reload(self, policy: Policy | str) -> None:
        """Replace the policy file, as an editor does, and have it read; wait until that is done."""
        new = self.policy_path.with_suffix(".new")
        new.write_text(str(policy), encoding="utf-8")
        new.rename(self.policy_path)
        self.signal(signal.SIGHUP)
        self.await_notice("READY=1")

    @contextlib.contextmanager
    def limited(self, **limits: str) -> Iterator[None]:
        """Have other limits in force for the length of the block: of those that the policy states.

        None are no change at all.
        """
        before = policy = self.policy_path.read_text(encoding="utf-8")
        for name, limit in limits.items():
            new = f'{name} = "{limit}"'
            policy, found = re.subn(f"^{name} = .*$", new, policy, flags=re.MULTILINE)
            assert found == 1, name
        if limits:
            self.reload(policy)
        try:
            yield
        finally:
            if limits:
                self.reload(before)

    def wait(self) -> int:
        """Wait for the broker's end, and give its exit status."""
        assert self._process is not None
        return self._process.wait(waiting.DEADLINE_S)

    def stop(self) -> None:
        """Stop, if it runs, and see that nothing is left."""
        assert self._process is not None
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        assert self.wait() == 0, self.log
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        """See that no process, no socket and no private directory is left."""
        self.await_none("")
        assert not self.socket.exists()
        assert not self.private.exists()
        assert "Traceback" not in self.log, self.log

    def discard(self) -> None:
        """Take away whatever is left, after whatever went wrong."""
        LIVE.discard(self)
        for agent in self._agents.values():
            agent.close()
        if self._process is not None:
            for process in processes.of_session(self.pid):
                with contextlib.suppress(ProcessLookupError):  # it ended by itself
                    os.kill(process.pid, signal.SIGKILL)
            self._process.wait(waiting.DEADLINE_S)
        if self._notified is not None:
            self._notified.close()
        shutil.rmtree(self.home)
