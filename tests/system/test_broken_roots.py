"""A root that can't be opened is none: who has named a path in it is told, and nobody else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, waiting
from harness.agent import conversion
from harness.callers import ALICE, BOB
from harness.daemon import Daemon
from harness.fixtures import MakeDaemon
from harness.mounts import Mounts
from harness.tracing import Tracer
from hostile import simple_calls, unresponsive_fuse
from policies import Grant, Policy, Root

from convertd.v1 import convert_pb2 as pb
from convertd_daemon.admin import check

INTACT: Final = Root("intact", "{scratch}/intact")
BROKEN_ROOT: Final = Root("broken", "{scratch}/broken")
USERS: Final = Root("users", "{scratch}/users", access="caller")
POLICY: Final = Policy(
    grants=[
        Grant(
            users=[1234, 1235],
            read=[BROKEN_ROOT, INTACT, USERS],
            write=[BROKEN_ROOT, INTACT, USERS],
        )
    ]
)

Broken = Callable[[Path], None]


@pytest.fixture
def roots(scratch: Path) -> Iterator[Path]:
    """Where the roots are. In the one that stays whole is an overlay on another image."""
    for name in ("intact", "broken", "users"):
        (scratch / name).mkdir()
    base = images.small(scratch / "intact" / "base.raw")
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base)]
    subprocess.run([*argv, str(scratch / "intact" / "overlay.qcow2")], check=True)
    yield scratch
    names = (str(scratch / name) for name in ("intact", "broken", "users"))
    subprocess.run(["rm", "-rf", *names], check=True)


@pytest.fixture
def daemon(roots: Path, make_daemon: MakeDaemon) -> Daemon:
    """A daemon that was started when all was well."""
    assert roots.is_dir()
    one = make_daemon(POLICY)
    one.start()
    return one


def a_link(path: Path) -> None:
    """Put a link in the root's place, to another root."""
    path.rmdir()
    path.symlink_to("intact")


def a_link_to_itself(path: Path) -> None:
    """Put a link in the root's place that never ends."""
    path.rmdir()
    path.symlink_to("broken")


def a_file(path: Path) -> None:
    """Put a file in the root's place."""
    path.rmdir()
    path.touch()


def missing(path: Path) -> None:
    """Take the root away."""
    path.rmdir()


def given_away_in_a_sticky_directory(path: Path) -> None:
    """Let a stranger replace the root."""
    path.parent.chmod(0o1777)
    os.chown(path, 1666, 1666)


BROKEN: Final = [
    (a_link, "SYMLINK_IN_PATH"),
    (a_link_to_itself, "SYMLINK_IN_PATH"),
    (a_file, "ROOT_UNUSABLE"),
    (missing, "SOURCE_NOT_FOUND"),
    (given_away_in_a_sticky_directory, "ROOT_UNUSABLE"),
]


def see_others_go_on(daemon: Daemon, roots: Path) -> None:
    """Convert and inspect what stands on another image, as two users."""
    intact = roots / "intact"
    for caller in (ALICE, BOB):
        out = intact / "out.raw"
        answer = simple_calls.convert(daemon, intact / "overlay.qcow2", out, "qcow2", caller)
        assert answer.is_ok, answer
        assert images.identical(out, intact / "base.raw")
        out.unlink()
        assert simple_calls.inspect(daemon, intact / "overlay.qcow2", "", caller).is_ok


@pytest.mark.parametrize(("breaking", "reason"), BROKEN)
def test_broken_root_is_reported_to_callers_of_that_root_only(
    daemon: Daemon, roots: Path, breaking: Broken, reason: str
) -> None:
    """As a source, to be looked at, and as a destination; the log has no traceback: see stop."""
    breaking(roots / "broken")
    try:
        see_others_go_on(daemon, roots)
        inside = roots / "broken" / "disk.raw"
        out = roots / "intact" / "out.raw"
        assert simple_calls.convert(daemon, inside, out, "raw").reason == reason
        assert simple_calls.inspect(daemon, inside).reason == reason
        as_dest = simple_calls.convert(daemon, roots / "intact" / "base.raw", inside, "raw")
        assert as_dest.reason == reason.replace("SOURCE", "DIRECTORY")
        assert as_dest.status != "INTERNAL"
        daemon.stop()
    finally:
        roots.chmod(0o755)


@pytest.mark.parametrize("breaking", [breaking for breaking, _ in BROKEN[:-1]])
def test_broken_root_does_not_keep_the_policy_from_loading(
    daemon: Daemon, roots: Path, breaking: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told by `check`, and is no mistake, nor in the way of a drop-in or of GetAccess."""
    breaking(roots / "broken")
    daemon.reload(daemon.policy_path.read_text(encoding="utf-8") + "\n")
    see_others_go_on(daemon, roots)
    assert "policy reloaded" in daemon.log
    access = daemon.agent(ALICE).call("GetAccess", pb.GetAccessRequest())
    assert access.end().status == "OK"
    assert check.run(str(daemon.policy_path)) == 0
    assert f"roots.broken.path: {roots}/broken " in capsys.readouterr().err
    assert check.print_dropin(str(daemon.policy_path)) == 0
    assert f"ReadWritePaths=-{roots}/broken" in capsys.readouterr().out


def test_root_that_a_caller_may_not_enter_affects_no_other_request(
    daemon: Daemon, roots: Path
) -> None:
    """Nor the caller, elsewhere."""
    (roots / "users").chmod(0o700)
    see_others_go_on(daemon, roots)
    answer = simple_calls.inspect(daemon, roots / "users" / "disk.raw")
    assert answer.reason == "ACCESS_REFUSED"


def test_root_on_a_dead_file_system_affects_no_other_request(
    roots: Path, make_daemon: MakeDaemon
) -> None:
    """FUSE whose server is gone: as when a network file system is stale."""
    (roots / "broken").rmdir()
    with Mounts(roots) as mounts:
        behind = roots / "behind"
        behind.mkdir()
        point = mounts.by_fuse(behind, "broken")
        daemon = make_daemon(POLICY)
        daemon.start()
        (server,) = subprocess.run(
            ["pgrep", "-f", f"^bindfs .*{point}$"], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(server), 9)
        # For a second the kernel still knows the directory's attributes.
        waiting.until(lambda: not os.path.exists(point), "the kernel asks a server that is gone")
        see_others_go_on(daemon, roots)
        answer = simple_calls.inspect(daemon, point / "disk.raw")
        assert (answer.status, answer.reason) == ("FAILED_PRECONDITION", "ROOT_UNUSABLE")
        daemon.reload(daemon.policy_path.read_text(encoding="utf-8") + "\n")
        assert "policy reloaded" in daemon.log
        see_others_go_on(daemon, roots)
        daemon.stop()
        behind.rmdir()
    (roots / "broken").mkdir()


def test_unresponsive_root_does_not_block_a_reload_or_other_callers(
    daemon: Daemon, roots: Path
) -> None:
    """Whoever asks it for anything waits in state D: only a child of the daemon's ever does."""
    with unresponsive_fuse.mounted(roots / "broken"):
        see_others_go_on(daemon, roots)
        daemon.reload(daemon.policy_path.read_text(encoding="utf-8") + "\n")
        assert "policy reloaded" in daemon.log
        see_others_go_on(daemon, roots)


@pytest.mark.parametrize("stated", ["qcow2", "raw", ""])
def test_image_without_a_backing_file_opens_no_other_root(
    daemon: Daemon, roots: Path, stated: str
) -> None:
    """And so it can't matter what has become of that."""
    intact = roots / "intact"
    image = images.converted(
        intact / "base.raw", intact / "alone", "raw" if stated == "raw" else "qcow2"
    )
    with Tracer(daemon.traced(), "openat2:delay_enter=0") as traced:
        assert simple_calls.convert(daemon, image, intact / "out.raw", stated).is_ok
        assert simple_calls.convert(
            daemon, intact / "overlay.qcow2", intact / "2.raw", "qcow2"
        ).is_ok
    first, _, second = traced.text.partition("overlay.qcow2")
    assert str(roots / "broken") not in first
    assert str(roots / "broken") in second


def test_backing_file_in_a_broken_root_is_refused_with_the_reason(
    daemon: Daemon, roots: Path
) -> None:
    """And is no bug."""
    a_file(roots / "broken")
    overlay = roots / "intact" / "overlay-2.qcow2"
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw"]
    behind = str(roots / "broken" / "base.raw")
    subprocess.run([*argv, "-b", behind, str(overlay), "1M"], check=True)
    request = conversion(overlay, roots / "intact" / "out.raw", source_format="qcow2")
    refusal = daemon.agent(ALICE).convert(request).refusal()
    assert refusal.reason == "BACKING_REFUSED"
    assert "can't be used: Not a directory" in refusal.message
