"""A passphrase is in the memory of those who need it and in pipes, and nowhere that can be read."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.agent import Call, conversion
from harness.callers import ALICE, BOB, ROOT
from harness.daemon import FRONT, JOB, QEMU_IMG, Daemon
from hostile import forged, simple_calls
from hostile.forged import Qcow2
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    operators=[0],
    grants=[Grant(read=[IMAGES], write=[IMAGES], formats=["raw", "qcow2", "luks", "vmdk"])],
)

MIB: Final = 1024 * 1024


@pytest.fixture
def own_dir(images_dir: Path) -> Path:
    """A directory of the caller's, with a raw image in it."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    simple_calls.file_of(ALICE, images_dir / "image.raw", os.urandom(2 * MIB))
    return images_dir


@pytest.fixture
def passphrases() -> tuple[bytes, bytes]:
    """Two that occur nowhere else on this machine."""
    return secrets.token_hex(20).encode(), secrets.token_hex(20).encode()


def encrypting(
    source: Path, dest: Path, dest_format: str, passphrase: bytes, *, slowly: bool = False
) -> pb.ConvertRequest:
    """A request for an encrypted result."""
    request = conversion(source, dest, dest_format=dest_format)
    request.dest.encryption.passphrase = passphrase
    request.dest.encryption.iter_time_milliseconds = 10
    if slowly:
        request.rate_limit_bytes_per_second = MIB
    return request


def arguments_and_environments() -> Iterator[bytes]:
    """Of every process of the machine, ours and not."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        for name in ("cmdline", "environ", "comm", "task"):
            try:
                yield Path(f"/proc/{pid}/{name}").read_bytes()
            except (IsADirectoryError, FileNotFoundError, ProcessLookupError, PermissionError):
                continue


def files_below(*directories: Path) -> Iterator[Path]:
    """Regular files."""
    for directory in directories:
        for where, _, names in os.walk(directory):
            paths = (Path(where, name) for name in names)
            yield from (path for path in paths if stat.S_ISREG(path.lstat().st_mode))


def seen(daemon: Daemon, directory: Path, passphrase: bytes) -> list[str]:
    """Where the passphrase can be read, of all places where somebody could look."""
    slots = [
        "a process's arguments or environment"
        for text in arguments_and_environments()
        if passphrase in text
    ]
    slots += [
        str(path) for path in files_below(daemon.home, directory) if passphrase in path.read_bytes()
    ]
    for caller in (ALICE, ROOT):
        listed = daemon.agent(caller).call("ListJobs", pb.ListJobsRequest())
        if passphrase in simple_calls.outcome_of(listed).received:
            slots.append("the list of jobs")
    if passphrase in simple_calls.outcome_of(daemon.agent(ROOT).call("GetStats", b"")).received:
        slots.append("the statistics")
    return slots


def finish(call: Call, passphrase: bytes) -> str:
    """Wait for the end; what was said on the way must not have it either."""
    answer = simple_calls.outcome_of(call)
    assert passphrase not in answer.received
    return answer.reason or answer.status


@pytest.mark.parametrize("dest_format", ["luks", "qcow2"])
def test_passphrase_is_not_readable_during_or_after_a_conversion(
    daemon: Daemon, own_dir: Path, passphrases: tuple[bytes, bytes], dest_format: str
) -> None:
    """To an encrypted image, and from it to another one with another passphrase."""
    one, other = passphrases
    first, second = own_dir / "first", own_dir / "second"
    agent = daemon.agent(ALICE)
    request = encrypting(own_dir / "image.raw", first, dest_format, one, slowly=True)
    call = agent.convert(request)
    daemon.await_one(QEMU_IMG)
    assert seen(daemon, own_dir, one) == []
    assert finish(call, one) == "OK"
    again = encrypting(first, second, dest_format, other, slowly=True)
    again.source.format = dest_format
    again.source.encryption.passphrase = one
    call = agent.convert(again)
    # One converts, and another may examine the source beside it.
    waiting.until(lambda: daemon.processes(QEMU_IMG), "qemu-img runs")
    assert seen(daemon, own_dir, one) + seen(daemon, own_dir, other) == []
    assert finish(call, other) == "OK"
    daemon.await_idle()
    assert seen(daemon, own_dir, one) + seen(daemon, own_dir, other) == []


def test_control_the_passphrase_search_finds_a_planted_passphrase(
    daemon: Daemon, own_dir: Path
) -> None:
    """The control."""
    in_a_file, in_memory = secrets.token_hex(), secrets.token_hex()
    simple_calls.file_of(ALICE, own_dir / "leak", b"there: " + in_a_file.encode())
    assert seen(daemon, own_dir, in_a_file.encode()) == [str(own_dir / "leak")]
    with BOB.popen(["sleep", "60"], env={"SECRET": in_memory}) as process:
        # execve(2) closes what Popen waits for before it has set up what /proc shows.
        waiting.until(lambda: seen(daemon, own_dir, in_memory.encode()), "the environment is read")
        process.kill()


def test_passphrase_is_in_no_error_message(
    daemon: Daemon, own_dir: Path, passphrases: tuple[bytes, bytes]
) -> None:
    """A wrong one, one for an image that has none, one that is too long, one with a bad option."""
    one, wrong = passphrases
    image, out = own_dir / "image.luks", own_dir / "out"
    agent = daemon.agent(ALICE)
    made = agent.convert(encrypting(own_dir / "image.raw", image, "luks", one))
    assert finish(made, one) == "OK"

    def opening(passphrase: bytes, path: Path = image, source_format: str = "luks") -> str:
        request = conversion(path, out, source_format=source_format, dest_format="raw")
        request.source.encryption.passphrase = passphrase
        return finish(agent.convert(request), passphrase)

    assert opening(wrong) == "WRONG_SECRET"
    assert opening(wrong * 200) == "BAD_OPTION"
    assert opening(wrong, own_dir / "image.raw", "raw") == "BAD_OPTION"
    assert opening(wrong, own_dir / "absent.luks") == "SOURCE_NOT_FOUND"
    assert opening(wrong, Path("/etc/shadow")) == "PERMISSION_DENIED"
    request = encrypting(own_dir / "image.raw", out, "luks", wrong)
    request.dest.encryption.cipher_alg = "rot13"
    assert finish(agent.convert(request), wrong) == "BAD_OPTION"
    daemon.await_idle()
    assert seen(daemon, own_dir, wrong) == []


def test_image_that_names_descriptors_can_not_read_the_passphrase(
    daemon: Daemon, own_dir: Path, passphrases: tuple[bytes, bytes]
) -> None:
    """It names each that qemu-img could have: the pipe is read before any image is opened."""
    one, other = passphrases
    for number in range(3, 16):
        name = f"/proc/self/fd/{number}"
        data_file, flat = Qcow2(data_file=name).data(), forged.flat_vmdk(name)
        for text, image_format in ((data_file, "qcow2"), (flat, "vmdk")):
            image = simple_calls.file_of(ALICE, own_dir / "evil", text)
            out = own_dir / "out"
            request = encrypting(image, out, "luks", other)
            request.source.format = image_format
            if image_format == "qcow2":
                request.source.encryption.passphrase = one
            finish(daemon.agent(ALICE).convert(request), other)
            assert not simple_calls.contains(out, one)
            assert not simple_calls.contains(out, other)
            out.unlink(missing_ok=True)


@pytest.mark.parametrize("name", [FRONT, JOB, QEMU_IMG])
def test_crashed_process_with_a_passphrase_leaves_no_core_dump(
    daemon: Daemon, own_dir: Path, passphrases: tuple[bytes, bytes], name: str
) -> None:
    """Whatever the machine does with core dumps: the kernel is told to make none."""
    one, _ = passphrases
    request = encrypting(own_dir / "image.raw", own_dir / "out", "luks", one, slowly=True)
    call = daemon.agent(ALICE).convert(request)
    daemon.await_one(QEMU_IMG)
    pid = daemon.await_one(name)
    where = Path(os.readlink(f"/proc/{pid}/cwd"))
    before = set(os.listdir(where))
    limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    (core,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    # 0 is ignored where cores go to a program, 1 is not. Source: core(5).
    assert core.split()[4:6] == ["1", "1"]
    os.kill(pid, signal.SIGABRT)
    call.end()
    daemon.await_none(QEMU_IMG)
    assert set(os.listdir(where)) == before
    assert not (own_dir / "out").exists()
    assert daemon.agent(BOB).access().uid == BOB.uid
    assert seen(daemon, own_dir, one) == []


def test_only_processes_that_need_a_passphrase_have_it_in_memory(
    daemon: Daemon, own_dir: Path, passphrases: tuple[bytes, bytes]
) -> None:
    """The broker, which is root and stays, never does."""
    one, _ = passphrases
    request = encrypting(own_dir / "image.raw", own_dir / "out", "luks", one, slowly=True)
    call = daemon.agent(ALICE).convert(request)
    call.await_started()
    worker = daemon.await_one(QEMU_IMG)
    waiting.until(lambda: is_seen_in(worker, one), "qemu-img has read it")
    assert not in_memory(daemon.pid, one)
    assert finish(call, one) == "OK"
    assert not in_memory(daemon.pid, one)


def is_seen_in(pid: int, text: bytes) -> bool:
    """Whether a process that is at work has these bytes; not if it gives memory back meanwhile."""
    with contextlib.suppress(OSError):
        return in_memory(pid, text)
    return False


def in_memory(pid: int, text: bytes) -> bool:
    """Whether a process has these bytes anywhere."""
    found = False
    with (
        open(f"/proc/{pid}/maps", encoding="utf-8") as maps,
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
    ):
        for line in maps:
            span, rights, *_ = line.split()
            if "r" in rights and "[v" not in line:
                start, end = (int(part, 16) for part in span.split("-"))
                memory.seek(start)
                found = found or text in memory.read(end - start)
    return found


def test_job_list_shows_nothing_about_encryption(
    daemon: Daemon, own_dir: Path, passphrases: tuple[bytes, bytes]
) -> None:
    """Paths and formats, and of the encryption nothing."""
    one, _ = passphrases
    request = encrypting(own_dir / "image.raw", own_dir / "out", "luks", one, slowly=True)
    call = daemon.agent(ALICE).convert(request)
    daemon.await_one(QEMU_IMG)
    (job,) = daemon.agent(ROOT).jobs()
    assert job.dest_path == str(own_dir / "out")
    assert one not in job.SerializeToString()
    call.cancel()
    call.end()
    daemon.await_idle()
    assert processes.exists(daemon.pid)
