"""How the daemon starts, and the one clear line with which it does not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import waiting
from harness.agent import Agent, conversion
from harness.callers import ALICE
from harness.daemon import COMMAND, Daemon, DidNotStart
from harness.fixtures import MakeDaemon
from harness.mounts import Mounts
from policies import IMAGES, LIBRARY, Grant, Policy

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY], write=[IMAGES])])


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """A daemon, not started yet."""
    return make_daemon(POLICY)


def refusal(daemon: Daemon, *wrapper: str) -> str:
    """The one line with which a daemon does not start; it ends with 1, and leaves nothing."""
    before = sorted(os.listdir(daemon.home))
    with pytest.raises(DidNotStart) as refused:
        daemon.start(wrapper=wrapper, options=())
    assert refused.value.status == 1, refused.value.output
    left = set(os.listdir(daemon.home)) - {*before, "log", "notify"}
    assert left == set()
    daemon.await_none("")
    (line,) = refused.value.output.splitlines()
    assert line.startswith("convertd: ")
    return line.removeprefix("convertd: ")


# --- the socket ---------------------------------------------------------------------------------


def test_socket_allows_every_user_to_connect(daemon: Daemon) -> None:
    """The policy decides, not the socket's mode."""
    daemon.start()
    assert daemon.socket.stat().st_mode & 0o7777 == 0o666
    assert daemon.agent(ALICE).access().uid == ALICE.uid


def test_second_daemon_does_not_take_the_socket_of_a_running_daemon(daemon: Daemon) -> None:
    """The second says so and ends; the first serves on."""
    daemon.start()
    second = Daemon(daemon.policy_path.read_text(encoding="utf-8"))
    try:
        second.socket = daemon.socket
        assert refusal(second) == f"{daemon.socket}: another daemon listens there"
    finally:
        second.discard()
    assert daemon.agent(ALICE).access().uid == ALICE.uid


def test_stale_socket_of_a_dead_daemon_is_removed(daemon: Daemon) -> None:
    """And what else it left: the front's socket in its directory."""
    daemon.start()
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    assert daemon.socket.exists()
    assert daemon.private.exists()
    daemon.await_none("")
    daemon.start()
    assert daemon.agent(ALICE).access().uid == ALICE.uid


def test_non_socket_at_the_socket_path_is_left_unchanged(daemon: Daemon) -> None:
    """Somebody mistyped a path."""
    daemon.socket.write_bytes(b"precious")
    assert refusal(daemon) == f"{daemon.socket}: exists, and is no socket"
    assert daemon.socket.read_bytes() == b"precious"


def test_socket_directory_that_others_can_write_is_refused(daemon: Daemon) -> None:
    """Clients would talk to whoever comes first."""
    directory = daemon.home / "open"
    directory.mkdir()
    directory.chmod(0o777)
    daemon.socket = directory / "convertd.sock"
    told = f"{directory}: others than root may put a socket there: {directory} can be changed by"
    assert refusal(daemon).startswith(told)


def test_missing_socket_directory_is_reported(daemon: Daemon) -> None:
    """It is not made, for it would be nobody's."""
    missing = daemon.home / "no such" / "directory"
    daemon.socket = missing / "convertd.sock"
    assert refusal(daemon) == (
        f"there is no directory {missing} for the socket; "
        f"make it with: install -d -m 755 '{missing}'"
    )
    subprocess.run(["install", "-d", "-m", "755", missing], check=True)
    daemon.start()
    assert daemon.agent(ALICE).access().uid == ALICE.uid


def test_socket_directory_that_is_not_a_directory_is_reported(daemon: Daemon) -> None:
    """By its name, and what is wrong with it."""
    daemon.socket = daemon.policy_path / "convertd.sock"
    assert refusal(daemon) == f"{daemon.policy_path}: is not a directory"


# --- where it is started ------------------------------------------------------------------------


def test_working_directory_at_start_can_be_unmounted(daemon: Daemon, scratch: Path) -> None:
    """No process of it stays there; and what was named from there is found again at a reload."""
    policy, public = daemon.policy_path, daemon.socket
    with Mounts(scratch) as mounts:
        here = mounts.in_memory("tmpfs", "here")
        daemon.policy_path = Path(os.path.relpath(policy, here))
        daemon.socket = Path(os.path.relpath(public, here))
        daemon.start(wrapper=("env", "-C", str(here)))
    daemon.policy_path, daemon.socket = policy, public
    for process in daemon.processes():
        assert os.readlink(f"/proc/{process.pid}/cwd") == "/"
    daemon.reload(Policy(operators=[ALICE.uid]))
    assert daemon.agent(ALICE).access().is_operator


# --- socket activation --------------------------------------------------------------------------

ACTIVATE: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="convertd.socket")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does. Source: sd_listen_fds(3)."""


@pytest.fixture
def listening(daemon: Daemon) -> Iterator[socket.socket]:
    """The socket that systemd would have made."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(daemon.socket))
        daemon.socket.chmod(0o666)
        sock.listen()
        yield sock


def start_activated(daemon: Daemon, sock: socket.socket) -> None:
    """Start as systemd would."""
    wrapper = (sys.executable, "-c", ACTIVATE, str(sock.fileno()))
    daemon.start(wrapper=wrapper, pass_fds=(sock.fileno(),))


def test_socket_passed_by_systemd_is_served_and_kept(
    daemon: Daemon, listening: socket.socket, library: Path, images_dir: Path
) -> None:
    """Whoever connected before the start is served, and after the end waits for the next."""
    early = Agent(ALICE, daemon.socket, daemon.log_path)
    request = conversion(library / "small.raw", images_dir / "dest.qcow2")
    call = early.convert(request)
    start_activated(daemon, listening)
    assert call.result().published
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert daemon.socket.is_socket()
    request.dest.path += "2"
    call = early.convert(request)
    start_activated(daemon, listening)
    assert call.result().published
    early.close()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    daemon.socket.unlink()
    daemon.check_nothing_is_left()


def test_socket_passed_by_systemd_must_be_a_listening_stream_socket(daemon: Daemon) -> None:
    """Anything else is a mistake in a unit."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        with pytest.raises(DidNotStart) as refused:
            start_activated(daemon, sock)
        assert refused.value.status == 1
        said = "what systemd passed is not a listening AF_UNIX stream socket"
        assert said in refused.value.output


# --- what must be there -------------------------------------------------------------------------


def in_a_mount_namespace(*binds: tuple[Path, str]) -> tuple[str, ...]:
    """A wrapper that puts files in place of others, for one process and its children."""
    mounts = " && ".join(f"mount --bind {source} {target}" for source, target in binds)
    return ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$0" "$@"')


@pytest.mark.parametrize("user", ["convertd", "convertd-qemu"])
def test_missing_system_user_is_reported_with_the_command_to_create_it(
    daemon: Daemon, user: str
) -> None:
    """As root, one line to paste."""
    passwd = daemon.home / "passwd"
    entries = Path("/etc/passwd").read_text(encoding="utf-8").splitlines(keepends=True)
    passwd.write_text("".join(entry for entry in entries if not entry.startswith(f"{user}:")))
    line = refusal(daemon, *in_a_mount_namespace((passwd, "/etc/passwd")))
    assert line.startswith(f"there is no user {user}; make it with: useradd ")
    assert line.endswith(f" {user}")


def test_system_user_with_uid_0_is_refused(daemon: Daemon) -> None:
    """An account with uid 0 is no account of its own."""
    passwd = daemon.home / "passwd"
    entries = Path("/etc/passwd").read_text(encoding="utf-8").splitlines()
    changed = [
        "convertd-qemu:x:0:0::/:/bin/false" if entry.startswith("convertd-qemu:") else entry
        for entry in entries
    ]
    passwd.write_text("\n".join(changed) + "\n")
    line = refusal(daemon, *in_a_mount_namespace((passwd, "/etc/passwd")))
    assert line.startswith("the user convertd-qemu must not be root")


def test_unprotected_hard_links_are_reported_with_the_command_to_protect_them(
    daemon: Daemon,
) -> None:
    """Anybody could link another's image into a directory of his own."""
    setting = daemon.home / "setting"
    setting.write_text("0\n")
    line = refusal(daemon, *in_a_mount_namespace((setting, "/proc/sys/fs/protected_hardlinks")))
    assert line == (
        "fs.protected_hardlinks is off; turn it on with: sysctl -w fs.protected_hardlinks=1"
    )


def test_kernel_without_landlock_is_reported(daemon: Daemon) -> None:
    """As one is that has it off: the system call is not there."""
    trace = ("strace", "-qq", "-o", "/dev/null", "-e", "trace=landlock_create_ruleset")
    line = refusal(daemon, *trace, "-e", "inject=landlock_create_ruleset:error=EOPNOTSUPP")
    assert line.startswith("this kernel has no Landlock, or has it off")


def test_missing_capabilities_are_reported(daemon: Daemon) -> None:
    """Without CAP_KILL a qemu-img could not be ended."""
    line = refusal(daemon, "setpriv", "--bounding-set=-kill", "--inh-caps=-kill")
    assert "KILL" in line.upper()


def test_daemon_started_by_a_user_other_than_root_is_refused(daemon: Daemon) -> None:
    """The policy of others is nobody's."""
    ran = ALICE.run([str(COMMAND), "--policy", str(daemon.policy_path), "--socket", "/run/x.sock"])
    assert ran.status == 1
    assert ran.err.startswith("convertd: the daemon must be started as root")
    assert len(ran.err.splitlines()) == 1


# --- qemu-img -----------------------------------------------------------------------------------


def test_missing_qemu_img_is_reported_with_its_package(make_daemon: MakeDaemon) -> None:
    """A fresh machine has none."""
    daemon = make_daemon(Policy(qemu_img="/usr/bin/no-such-qemu-img"))
    line = refusal(daemon)
    assert line == "/usr/bin/no-such-qemu-img: No such file or directory (package qemu-utils)"


@pytest.mark.parametrize("change", ["owner", "mode"])
def test_qemu_img_that_others_than_root_can_write_is_refused(
    make_daemon: MakeDaemon, scratch: Path, change: str
) -> None:
    """It reads what its caller may not."""
    program = scratch / "qemu-img"
    shutil.copy("/usr/bin/qemu-img", program)
    program.chmod(0o775 if change == "mode" else 0o755)
    os.chown(program, ALICE.uid if change == "owner" else 0, 0)
    line = refusal(make_daemon(f'qemu_img = "{program}"'))
    assert line == f"{program}: is not a program that only root can write"


def test_program_that_is_not_qemu_img_fails_the_self_test(make_daemon: MakeDaemon) -> None:
    """64 KiB are converted in the sandbox before anybody is let in."""
    line = refusal(make_daemon(Policy(qemu_img="/usr/bin/true")))
    assert line.startswith("the self-test failed: ")


# --- the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        pytest.param("[limits]\njobs = 0", "limits.jobs: must be from 1 to 256", id="limit"),
        pytest.param(
            '[roots.all]\npath = "/"\naccess = "daemon"', "roots.all.path: / is too wide", id="root"
        ),
        pytest.param("limit = 1", "limit: is not a key of the policy", id="unknown key"),
        pytest.param("[limits", "is not TOML: ", id="no TOML"),
    ],
)
def test_invalid_policy_is_reported_with_file_and_key(
    make_daemon: MakeDaemon, policy: str, said: str
) -> None:
    """As `convertd check` does."""
    daemon = make_daemon(Policy())
    daemon.policy_path.write_text(policy, encoding="utf-8")
    assert refusal(daemon).startswith(f"{daemon.policy_path}: {said}")


def test_missing_policy_is_reported(daemon: Daemon) -> None:
    """By its name."""
    daemon.policy_path.unlink()
    assert refusal(daemon).startswith(f"{daemon.policy_path}: ")


def test_policy_that_others_can_write_is_refused(daemon: Daemon) -> None:
    """They would decide who may do what."""
    daemon.policy_path.chmod(0o666)
    line = refusal(daemon)
    assert line.startswith(f"{daemon.policy_path}: ")
    assert line.endswith("can be changed by everybody")


def test_daemon_starts_with_unknown_users_in_its_policy(make_daemon: MakeDaemon) -> None:
    """A name that does not exist is a warning."""
    daemon = make_daemon(Policy(operators=["no-such-user"]))
    daemon.start()
    assert not daemon.agent(ALICE).access().is_operator
    waiting.until(lambda: "there is no user no-such-user" in daemon.log, "the warning")
