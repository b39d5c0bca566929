"""What each of the four processes is and may do, as /proc says, in all of its threads."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import children
import pytest
from harness import images, processes, waiting
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import FRONT, PREFORKED_JOB, QEMU_IMG, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])])

MIB: Final = 1024 * 1024

CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, KILL, SETGID, SETUID = 0, 1, 2, 3, 5, 6, 7
"""Source: linux/capability.h."""

FILTERED: Final = 2
"""SECCOMP_MODE_FILTER. Source: proc_pid_status(5)."""


def mask(*capabilities: int) -> int:
    """Capabilities as the bits that /proc shows."""
    return sum(1 << number for number in capabilities)


BROKERS: Final = mask(CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, KILL, SETGID, SETUID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A conversion in the middle, its process, and its qemu-img's."""

    job: int
    qemu_img: int
    source: Path
    dest: Path


@contextlib.contextmanager
def converting(daemon: Daemon, source: Path, dest: Path) -> Iterator[Running]:
    """A conversion that takes a minute, from when qemu-img runs until it is cancelled."""
    before = {process.pid for process in daemon.processes(QEMU_IMG)}
    request = conversion(source, dest, rate_limit_bytes_per_second=MIB)
    call = daemon.agent(ALICE).convert(request)
    job_id = call.await_event(lambda event: event.progress.percent > 0).progress.job_id
    (worker,) = [one for one in daemon.processes(QEMU_IMG) if one.pid not in before]
    try:
        yield Running(job=worker.parent, qemu_img=worker.pid, source=source, dest=dest)
    finally:
        call.cancel()
        call.end()
        waiting.until(lambda: not processes.exists(worker.parent), "the job is gone")
        # The broker reaps it first, and then lets go of the destination.
        agent = daemon.agent(ALICE)
        waiting.until(lambda: job_id not in {job.job_id for job in agent.jobs()}, "it is let go")


@pytest.fixture
def running(daemon: Daemon, library: Path, scratch: Path) -> Iterator[Running]:
    """A conversion of an image that root alone may read."""
    # A name of its own: a slow machine may be done with one before its test is.
    dest = scratch / "images" / f"dest-{os.urandom(4).hex()}.qcow2"
    with converting(daemon, library / "bulky.raw", dest) as found:
        yield found


@pytest.fixture(scope="module")
def open_source(library: Path, scratch: Path) -> Path:
    """An image that everybody may read."""
    path = scratch / "images" / "open.raw"
    shutil.copy(library / "bulky.raw", path)
    path.chmod(0o644)
    return path


def identity(name: str) -> tuple[int, int]:
    """The uid and the gid of a user."""
    entry = pwd.getpwnam(name)
    return entry.pw_uid, entry.pw_gid


# --- the broker ---------------------------------------------------------------------------------


def test_broker_is_root_with_seven_capabilities_and_can_gain_no_more(daemon: Daemon) -> None:
    """One thread, the same four sets as while it serves and as before it served."""
    (thread,) = processes.threads(daemon.pid)
    assert (thread.uids, thread.gids) == ((0,) * 4, (0,) * 4)
    assert thread.permitted == thread.effective == thread.bounding == BROKERS
    assert thread.inheritable == thread.ambient == 0
    assert thread.no_new_privs == 1


def test_broker_never_loads_grpc_or_protobuf(daemon: Daemon, running: Running) -> None:
    """Nor do the jobs that it forks. The front does, so that one would see it."""
    parsers = re.compile("grpc|protobuf|upb|libssl")
    for pid in (daemon.pid, running.job):
        assert not [path for path in processes.mapped_files(pid) if parsers.search(path)]
    front = processes.mapped_files(daemon.await_one(FRONT))
    assert [path for path in front if "cygrpc" in path]


def test_front_does_not_load_openssl(daemon: Daemon) -> None:
    """It speaks on local sockets alone: that would be 5 MiB, and a way in, for nothing."""
    front = processes.mapped_files(daemon.await_one(FRONT))
    assert not [path for path in front if "libssl" in path]


def test_broker_has_no_descriptor_of_a_running_job(daemon: Daemon, running: Running) -> None:
    """Nor a directory of anybody's: what a job opens is gone with the job."""
    found = processes.descriptors(daemon.pid)
    files = {path for path in found.values() if path.startswith("/")}
    own = {path for path in files if path.startswith(f"{daemon.socket}.")}
    assert files == {"/dev/null", str(daemon.log_path), *own}
    assert set(sockets(running.job)).isdisjoint(sockets(daemon.pid))


def sockets(pid: int) -> list[str]:
    """The sockets that a process has."""
    found = processes.descriptors(pid).values()
    return [name for name in found if name.startswith("socket:")]


# --- the front ----------------------------------------------------------------------------------


def test_front_has_no_capability_in_any_thread(daemon: Daemon) -> None:
    """GRPC's threads were started after the lock, or it would not bind them."""
    uid, gid = identity("convertd")
    threads = processes.threads(daemon.await_one(FRONT))
    assert len(threads) > 3
    for thread in threads:
        assert (thread.uids, thread.gids, thread.groups) == ((uid,) * 4, (gid,) * 4, frozenset())
        assert thread.permitted == thread.effective == thread.ambient == 0, thread
        assert thread.inheritable == 0
        assert thread.bounding & ~BROKERS == 0
        assert (thread.no_new_privs, thread.seccomp) == (1, FILTERED), thread


def test_front_has_no_file_open(daemon: Daemon, running: Running) -> None:
    """Sockets, and what event loops are made of."""
    front = daemon.await_one(FRONT)
    kinds = {path.split(":")[0] for path in processes.descriptors(front).values()}
    assert kinds <= {"/dev/null", str(daemon.log_path), "socket", "anon_inode"}
    assert running.job != front


def test_front_has_the_root_directory_as_its_working_directory(daemon: Daemon) -> None:
    """It keeps nothing from being unmounted."""
    assert os.readlink(f"/proc/{daemon.await_one(FRONT)}/cwd") == "/"


# --- the job ------------------------------------------------------------------------------------


def test_job_has_the_capabilities_of_its_broker_and_no_more(running: Running) -> None:
    """One thread; Landlock, which /proc does not show, narrows it to this job's inodes."""
    (thread,) = processes.threads(running.job)
    assert thread.uids == thread.gids == (0,) * 4
    assert thread.permitted & ~BROKERS == thread.effective & ~BROKERS == 0
    assert thread.bounding & ~BROKERS == 0
    assert thread.inheritable == thread.ambient == 0
    assert thread.no_new_privs == 1


def test_job_has_no_descriptor_of_another_job(
    daemon: Daemon, running: Running, open_source: Path, scratch: Path
) -> None:
    """A forked process inherits all, close-on-exec or not, unless it closes all."""
    with converting(daemon, open_source, scratch / "images" / "second.qcow2") as second:
        assert second.job != running.job
        shared = [set(processes.descriptors(one.job).values()) for one in (running, second)]
        common = {name for name in shared[0] & shared[1] if not name.startswith("anon_inode:")}
        directory = str(scratch / "images")
        assert common == {"/dev/null", str(daemon.log_path), directory, "/usr/bin/qemu-img"}
        # Its channel to the front: whoever closes the other end ends the job.
        assert [len(sockets(one.job)) for one in (running, second)] == [1, 1]


# --- qemu-img -----------------------------------------------------------------------------------


def test_qemu_img_has_one_capability_and_only_for_a_source_that_needs_it(
    running: Running,
) -> None:
    """To read what is root's alone: CAP_DAC_READ_SEARCH, in each of its threads."""
    check_qemu_img(running.qemu_img, mask(DAC_READ_SEARCH))


def test_qemu_img_has_no_capability_for_a_world_readable_source(
    daemon: Daemon, open_source: Path, scratch: Path
) -> None:
    """Nor for one that its own group may."""
    with converting(daemon, open_source, scratch / "images" / "third.qcow2") as found:
        check_qemu_img(found.qemu_img, 0)


def check_qemu_img(pid: int, capabilities: int) -> None:
    """See that every thread is that user's, filtered, with exactly these capabilities."""
    uid, gid = identity("convertd-qemu")
    threads = processes.threads(pid)
    assert len(threads) > 1
    for thread in threads:
        assert (thread.uids, thread.gids, thread.groups) == ((uid,) * 4, (gid,) * 4, frozenset())
        assert thread.permitted == thread.effective == thread.ambient == capabilities
        assert thread.inheritable & ~capabilities == 0
        assert thread.bounding & ~BROKERS == 0
        assert (thread.no_new_privs, thread.seccomp) == (1, FILTERED), thread


def test_qemu_img_has_only_its_own_descriptors(running: Running) -> None:
    """Its source, its result, which has no name, two pipes, and its own event loop's."""
    found = processes.descriptors(running.qemu_img)
    kinds = {path.split(":")[0] for path in found.values()}
    (result,) = [path for path in kinds if path.startswith(str(running.dest.parent))]
    assert re.fullmatch(r"/.*/#\d+ \(deleted\)", result)
    assert kinds == {"/dev/null", "pipe", "anon_inode", str(running.source), result}
    assert found[0] == "/dev/null"
    assert [name.split(":")[0] for name in (found[1], found[2])] == ["pipe", "pipe"]
    assert max(found) < 256


def test_qemu_img_arguments_have_descriptors_and_no_paths(running: Running) -> None:
    """What it opens by name it opens through /proc/self/fd."""
    argv = processes.argv(running.qemu_img)
    assert argv[:2] == ["qemu-img", "convert"]
    assert not [word for word in argv if str(running.dest.parent) in word]
    assert '"filename":"/proc/self/fd/' in argv[-2]
    assert argv[-1].startswith("/proc/self/fd/")


def test_qemu_img_has_a_clean_environment(running: Running) -> None:
    """Nothing of who started the daemon."""
    environment = processes.environment(running.qemu_img)
    assert environment.keys() == {"LC_ALL", "MALLOC_ARENA_MAX", "PATH"}
    assert (environment["LC_ALL"], environment["MALLOC_ARENA_MAX"]) == ("C", "1")


def test_qemu_img_has_resource_limits_and_low_priority(running: Running) -> None:
    """In memory, descriptors and core dumps. A conversion's processor time is not."""
    with open(f"/proc/{running.qemu_img}/limits", encoding="ascii") as limits:
        hard = {line[:25].strip(): line[47:68].strip() for line in limits}
    assert hard["Max open files"] == "256"
    assert hard["Max address space"] == str(1024 * MIB)
    assert hard["Max core file size"] == "1"
    assert hard["Max cpu time"] == "unlimited"
    assert os.getpriority(os.PRIO_PROCESS, running.qemu_img) == 19


def test_process_of_the_front_user_can_not_trace_the_front(daemon: Daemon) -> None:
    """It passes passphrases on. Whose user it is may have other processes, by some mistake."""
    front = daemon.await_one(FRONT)
    user = pwd.getpwnam("convertd")

    def act() -> dict[str, str]:
        os.setgroups([])
        os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
        os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
        paths = [f"/proc/{front}/{name}" for name in ("mem", "environ", "maps", "fd", "auxv")]
        return {path: children.errno_of(functools.partial(os.open, path, 0)) for path in paths}

    outcomes = children.in_child(act)
    assert outcomes == dict.fromkeys(outcomes, "EACCES")
    assert os.stat(f"/proc/{front}/fd").st_uid == 0


@pytest.mark.parametrize(("isolation", "option"), [((), "-P"), (("-I",), "-I")])
def test_front_runs_with_the_python_isolation_of_the_broker(
    make_daemon: MakeDaemon, scratch: Path, isolation: tuple[str, ...], option: str
) -> None:
    """As installed, from all of PYTHON*; always from the working directory."""
    home = scratch / f"python{option}"
    home.mkdir()
    script = f"import os, sys; open({str(home)!r} + f'/{{os.getuid()}}', 'w').close()"
    (home / "sitecustomize.py").write_text(script, encoding="utf-8")
    home.chmod(0o777)
    daemon = make_daemon(POLICY)
    daemon.start(wrapper=("env", f"PYTHONPATH={home}", sys.executable, *isolation))
    front = daemon.await_one(FRONT)
    assert processes.argv(front)[1:4] == [option, "-m", "convertd_daemon.front"]
    assert (home / f"{pwd.getpwnam('convertd').pw_uid}").exists() == (not isolation)
    daemon.stop()


# --- what they leave ----------------------------------------------------------------------------


def test_finished_conversion_leaves_no_process_behind(
    daemon: Daemon, running: Running, library: Path, images_dir: Path
) -> None:
    """Nor its zombie: the broker reaps."""
    request = conversion(library / "small.raw", images_dir / "dest.qcow2")
    daemon.agent(ALICE).convert(request).result()
    expected = {daemon.pid, daemon.await_one(FRONT), running.job, running.qemu_img}
    waiting.until(
        lambda: (
            {one.pid for one in processes.of_session(daemon.pid) if one.name != PREFORKED_JOB}
            == expected
        ),
        "the processes of the other conversion only",
    )
    assert images.identical(library / "small.raw", images_dir / "dest.qcow2")
