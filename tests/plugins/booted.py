"""A machine with a real systemd: this one's files, as a container boots them, and nothing kept.

The root is an overlay of this machine's own on a tmpfs, so what a test installs there is gone with
it, and `changes` can tell all of it. Ready in about 4 s. Needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from policies import Grant, Policy, Root

T = TypeVar("T")

POLICY_PATH: Final = "/etc/convertd/policy.toml"
NOTHING_ELSE: Final = Policy()

REPOSITORY: Final = Path(__file__).parents[2]

LANDLOCK: Final = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"""systemd-nspawn's list of system calls is older than these."""

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

WAIT_S: Final = 120.0
"""Ample for what takes a second or two, on a machine that is busy."""


def wait_for(fact: Callable[[], T], what: str, limit_s: float = WAIT_S) -> T:
    """Wait until a fact is true, and give it.

    Raises:
        TimeoutError: it is not, in time.
    """
    deadline = time.monotonic() + limit_s
    while not (found := fact()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s:g} s: {what}")
        time.sleep(0.02)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A booted system. `leader` is its process 1, `root` its file system, `upper` what changed."""

    leader: int
    root: Path
    upper: Path

    def start(self, *command: str, uid: int = 0) -> subprocess.Popen[str]:
        """Start a command in it, as a user without groups, with pipes to it."""
        become = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups") if uid else ()
        return subprocess.Popen(
            ["nsenter", f"--target={self.leader}", "--all", "--wd=/", *become, *command],
            env={"PATH": PATH, "LANG": "C.UTF-8"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, *command: str, uid: int = 0, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it, with `stdin` on its standard input.

        Raises:
            AssertionError: it failed, and `check` is true. Shows what it printed.
        """
        with self.start(*command, uid=uid) as running:
            try:
                out, err = running.communicate(stdin, timeout=WAIT_S)
            except BaseException:
                running.kill()
                raise
        done = subprocess.CompletedProcess(command, running.returncode, out, err)
        if check and done.returncode != 0:
            raise AssertionError(f"{shlex.join(command)}: {done.returncode}\n{out}{err}")
        return done

    def output_of(self, *command: str, uid: int = 0) -> str:
        """What a command prints."""
        return self.run(*command, uid=uid).stdout.strip()

    def access(self, uid: int) -> str:
        """What a user is told of what it may do, as soon as the daemon serves.

        convertctl waits a few seconds for that; to start here can take longer.
        """

        def answer() -> str:
            return self.run("convertctl", "access", uid=uid, check=False).stdout.strip()

        return wait_for(answer, "an answer")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in it, directories included."""
        self.run("install", "-D", "-m", f"{mode:04o}", "/dev/stdin", path, stdin=text)

    def grant(self, root: str, uid: int, policy: Policy = NOTHING_ELSE) -> None:
        """Let a user convert in a directory, and the service write there.

        `policy` states the rest, its limits for example.
        """
        self.run("mkdir", "--parents", root)
        images = Root("images", root)
        grant = Grant(users=[uid], read=[images], write=[images])
        self.write(POLICY_PATH, str(dataclasses.replace(policy, grants=[grant])))
        dropped = self.run("convertd", "unit-dropin").stdout
        self.write("/etc/systemd/system/convertd.service.d/policy.conf", dropped)
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "restart", "convertd.service")

    def revoke(self) -> None:
        """Take the policy and the drop-in that an install leaves: none."""
        policy = REPOSITORY / "packaging" / "systemd" / "policy.toml"
        self.write(POLICY_PATH, policy.read_text(encoding="utf-8"))
        self.run("rm", "-f", "/etc/systemd/system/convertd.service.d/policy.conf")
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "restart", "convertd.service")

    def show(self, unit: str, *properties: str) -> Mapping[str, str]:
        """What systemd says of a unit."""
        lines = self.output_of("systemctl", "show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in lines.splitlines())

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The journal's entries, as journalctl exports them."""
        self.run("journalctl", "--sync")
        lines = self.output_of("journalctl", "--output=json", "--all", "--no-pager", *matches)
        return [json.loads(line) for line in lines.splitlines()]

    def changes(self) -> set[str]:
        """Every file that is not what it was before the boot, deleted ones included."""
        found = {
            "/" + str(Path(directory, name).relative_to(self.upper))
            for directory, _, names in os.walk(self.upper)
            for name in names
        }
        mounts = ("/run", "/tmp", "/dev", "/proc", "/sys")  # noqa: S108 - the machine's own
        return {path for path in found if not path.startswith(mounts)}


@contextlib.contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    """Boot a machine whose files are kept below `directory` until it is left."""
    with contextlib.ExitStack() as stack:
        root = _overlay(stack, directory)
        log = stack.enter_context(open(directory / "console", "w+", encoding="utf-8"))
        name = f"convertd-{os.getpid()}-{directory.name}"
        container = subprocess.Popen(
            [
                *(
                    "sh",
                    "-c",
                    'for group in $1; do echo $$ >"$group"; done; shift; exec "$@"',
                    "sh",
                ),
                " ".join(_cgroups(stack, name)),
                "systemd-nspawn",
                f"--directory={root}",
                f"--machine={name}",
                *("--register=no", "--keep-unit", "--console=pipe", "--quiet"),
                *("--capability=all", f"--system-call-filter={LANDLOCK}"),
                "--link-journal=no",
                f"--bind-ro={REPOSITORY}",
                *("--boot", "systemd.unit=multi-user.target"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        stack.callback(container.wait)
        stack.callback(container.kill)
        try:
            leader = wait_for(lambda: _child_of(container), "the container's process 1", WAIT_S)
            # With its process 1 all of the container ends.
            stack.callback(_kill, leader)
            booted = Machine(leader=leader, root=root, upper=directory / "tmpfs" / "upper")
            ready = ("systemctl", "is-system-running")
            states = {"running", "degraded"}
            wait_for(
                lambda: booted.run(*ready, check=False).stdout.strip() in states, "boot", WAIT_S
            )
        except TimeoutError as error:
            log.seek(0)
            raise AssertionError(f"{error}\n{log.read()}") from error
        yield booted


def _overlay(stack: contextlib.ExitStack, directory: Path) -> Path:
    tmpfs, root = directory / "tmpfs", directory / "root"
    tmpfs.mkdir(parents=True)
    root.mkdir()
    _mount(stack, "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(tmpfs))
    for name in ("upper", "work"):
        (tmpfs / name).mkdir()
    layers = f"lowerdir=/,upperdir={tmpfs / 'upper'},workdir={tmpfs / 'work'}"
    _mount(stack, "-t", "overlay", "-o", layers, "overlay", str(root))
    return root


def _cgroups(stack: contextlib.ExitStack, name: str) -> list[str]:
    """Make it a cgroup of its own: two machines in one would each take the other's for theirs.

    Gives the files that a process moves itself there by. systemd uses the second version's
    hierarchy, or a named one of the first, or both.
    """
    slots = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 ") or "name=systemd" in kind:
            place = Path(mount.split()[4], name)
            place.mkdir()
            stack.callback(_remove_cgroup, place)
            slots.append(str(place / "cgroup.procs"))
    return slots


def _remove_cgroup(place: Path) -> None:
    """Remove a cgroup and those below it, as soon as their processes are gone."""

    def removed() -> bool:
        try:
            for directory, _, _ in os.walk(place, topdown=False):
                os.rmdir(directory)
        except OSError:
            return False
        return True

    wait_for(removed, f"{place} is empty")


def _mount(stack: contextlib.ExitStack, *arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
    stack.callback(subprocess.run, ["umount", "--lazy", arguments[-1]], check=True)


def _child_of(container: subprocess.Popen[bytes]) -> int:
    """Process 1 of a container, 0 if it is not there yet."""
    if container.poll() is not None:
        raise TimeoutError(f"systemd-nspawn ended with status {container.returncode}")
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
    # Another child, in our own PID namespace, prepares the way for it.
    return next((int(child) for child in children if _pid_in_its_namespace(child) == "1"), 0)


def _pid_in_its_namespace(pid: str) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[-1]
    return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
