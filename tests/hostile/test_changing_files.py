"""Images and names that change while they are looked at, by a user who may change them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.agent import conversion
from harness.callers import ALICE, BOB, PYTHON
from harness.daemon import JOB, Daemon
from harness.tracing import Tracer
from hostile import forged, racing, simple_calls
from hostile.forged import Qcow2
from hostile.secret import Secret
from policies import IMAGES, Grant, Policy

POLICY: Final = Policy(
    grants=[Grant(read=[IMAGES], write=[IMAGES], formats=["raw", "qcow2", "vmdk"])]
)

ROUNDS: Final = int(os.environ.get("CONVERTD_TEST_RACES", "25"))
"""How many conversions each race is run against."""

HONEST: Final = b"what the image is meant to hold " * (forged.SIZE // 32)


@pytest.fixture
def own_dir(images_dir: Path) -> Path:
    """A directory below the root that is the caller's own."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    return images_dir


@pytest.fixture
def system_file() -> Iterator[tuple[Path, bytes]]:
    """A file that only root may read, below a directory that is everybody's to search."""
    directory = Path(tempfile.mkdtemp(prefix="convertd-test-", dir="/usr/lib"))
    directory.chmod(0o755)
    marker = f"<{secrets.token_hex(15)}>".encode()
    path = directory / "disk.raw"
    path.write_bytes((marker * forged.SIZE)[: forged.SIZE])
    path.chmod(0o600)
    yield path, marker
    shutil.rmtree(directory)


def honest_qcow2(directory: Path) -> bytes:
    """A qcow2 with what it should hold."""
    raw, path = directory / "honest.raw", directory / "honest.qcow2"
    raw.write_bytes(HONEST)
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(argv, check=True)
    data = path.read_bytes()
    raw.unlink()
    path.unlink()
    return data


def hammer(daemon: Daemon, source: Path, stated: str, marker: bytes) -> Counter[str]:
    """Convert again and again. Every result is looked through; how each ended is counted."""
    ends: Counter[str] = Counter()
    for number in range(ROUNDS):
        out = source.parent / f"out-{number}.raw"
        answer = simple_calls.convert(daemon, source, out, stated)
        ends[answer.reason or answer.status] += 1
        assert out.exists() is answer.is_ok
        assert not simple_calls.contains(out, marker)
        assert marker not in answer.received
        out.unlink(missing_ok=True)
    return ends


def bare_leaks(image: Path, marker: bytes) -> bool:
    """Whether bare qemu-img puts the secret into its result."""
    out = image.with_suffix(".bare")
    argv = ["qemu-img", "convert", "-O", "raw", str(image), str(out)]
    subprocess.run(argv, check=False, capture_output=True)
    found = simple_calls.contains(out, marker)
    out.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("kind", ["backing file", "data file"])
@pytest.mark.parametrize("stated", ["qcow2", ""])
def test_header_rewritten_after_the_probe_gives_access_to_no_other_file(
    daemon: Daemon, secret: Secret, own_dir: Path, kind: str, stated: str
) -> None:
    """Honest when it is probed, and not when it is converted: nothing but the kernel can help."""
    honest, name = honest_qcow2(own_dir), str(secret.raw)
    evil = {
        "backing file": Qcow2(backing=name, backing_format="raw"),
        "data file": Qcow2(data_file=name),
    }[kind].data()
    image = simple_calls.file_of(ALICE, own_dir / "image.qcow2", evil)
    assert bare_leaks(image, secret.marker)
    with racing.rewriting(ALICE, image, evil, honest) as count:
        ends = hammer(daemon, image, stated, secret.marker)
    assert count.changes > 10 * ROUNDS
    assert ends["OK"] < ROUNDS, "the race was never lost: it tests nothing"


def test_header_rewritten_after_the_probe_gives_access_to_no_system_file(
    daemon: Daemon, system_file: tuple[Path, bytes], own_dir: Path
) -> None:
    """Libraries must be open to qemu-img. What lies beside them must not.

    Once all of /usr/lib was, and the worker's CAP_DAC_READ_SEARCH read there what is root's alone.
    """
    name, marker = system_file
    honest, evil = honest_qcow2(own_dir), Qcow2(data_file=str(name)).data()
    image = simple_calls.file_of(ALICE, own_dir / "image.qcow2", evil)
    assert bare_leaks(image, marker)
    with racing.rewriting(ALICE, image, evil, honest):
        hammer(daemon, image, "qcow2", marker)
    image.unlink()
    descriptor = simple_calls.file_of(ALICE, own_dir / "image.vmdk", forged.flat_vmdk(str(name)))
    assert bare_leaks(descriptor, marker)
    hammer(daemon, descriptor, "vmdk", marker)


def test_source_name_swapped_during_open_gives_the_file_or_a_refusal(
    daemon: Daemon, secret: Secret, own_dir: Path
) -> None:
    """File, link to a secret, directory, FIFO, device: in turn, under one name."""
    image = simple_calls.file_of(ALICE, own_dir / "image.raw", HONEST)
    (own_dir / "link").symlink_to(secret.raw)
    (own_dir / "directory").mkdir()
    os.mkfifo(own_dir / "fifo")
    assert bare_leaks(own_dir / "link", secret.marker)
    with racing.swapping(ALICE, own_dir, "image.raw", "link", "directory", "fifo") as count:
        ends = hammer(daemon, image, "raw", secret.marker)
    assert count.changes > 10 * ROUNDS
    assert ends.keys() <= {"OK", "SYMLINK_IN_PATH", "NOT_AN_IMAGE"}
    assert len(ends) > 1, "the race was never lost: it tests nothing"


def test_directory_swapped_during_path_resolution_does_not_lead_out_of_the_root(
    daemon: Daemon, secret: Secret, own_dir: Path
) -> None:
    """For the source and for the destination: nothing is read from there, nothing made there."""
    (own_dir / "way").mkdir()
    os.chown(own_dir / "way", ALICE.uid, ALICE.gid)
    simple_calls.file_of(ALICE, own_dir / "way" / "disk.raw", HONEST)
    (own_dir / "link").symlink_to(secret.directory)
    assert bare_leaks(own_dir / "link" / "disk.raw", secret.marker)
    with racing.swapping(ALICE, own_dir, "way", "link") as count:
        ends: Counter[str] = Counter()
        for number in range(ROUNDS):
            source, dest = own_dir / "way" / "disk.raw", own_dir / "way" / f"out-{number}.raw"
            answer = simple_calls.overwrite(daemon, source, dest)
            ends[answer.reason or answer.status] += 1
    assert count.changes > 10 * ROUNDS
    assert ends.keys() <= {"OK", "SYMLINK_IN_PATH"}
    assert len(ends) > 1, "the race was never lost: it tests nothing"
    assert secret.unchanged()
    results = [path for path in (own_dir / "way").iterdir() if path.name != "disk.raw"]
    assert len(results) == ends["OK"]
    assert all(path.read_bytes() == HONEST for path in results)


def test_destination_name_swapped_during_a_job_is_replaced_or_left_unchanged(
    daemon: Daemon, secret: Secret, own_dir: Path
) -> None:
    """Nothing is written through a link, into a directory or to a FIFO; and no temporary stays."""
    image = simple_calls.file_of(ALICE, own_dir / "image.raw", HONEST)
    names = {"image.raw", "out", "link", "directory", "fifo"}
    simple_calls.file_of(ALICE, own_dir / "out", b"old")
    (own_dir / "link").symlink_to(secret.raw)
    (own_dir / "directory").mkdir()
    os.mkfifo(own_dir / "fifo")
    for name in ("link", "fifo"):
        os.chown(own_dir / name, ALICE.uid, ALICE.gid, follow_symlinks=False)
    with racing.swapping(ALICE, own_dir, "out", "link", "directory", "fifo") as count:
        ends: Counter[str] = Counter()
        for _ in range(ROUNDS):
            answer = simple_calls.overwrite(daemon, image, own_dir / "out")
            ends[answer.reason or answer.status] += 1
    assert count.changes > 10 * ROUNDS
    allowed = {"OK", "SYMLINK_IN_PATH", "NOT_AN_IMAGE", "DEST_EXISTS", "NAME_REPLACED"}
    # The last where a directory took the name at the very end: Landlock has none replaced.
    assert ends.keys() <= allowed | {"WRITE_FAILED", "ACCESS_REFUSED"}
    assert secret.unchanged()
    assert set(os.listdir(own_dir)) <= names
    assert os.listdir(own_dir / "directory") == []


def test_user_can_not_hard_link_files_of_another_user_into_a_root(
    secret: Secret, own_dir: Path
) -> None:
    """A hard link would be a regular file below the root.

    fs.protected_hardlinks, on which the daemon insists, keeps a user from making one.
    """
    victim = own_dir.parent / "victim"
    victim.write_bytes(secret.marker)
    victim.chmod(0o600)
    script = "import os, sys; os.link(sys.argv[1], sys.argv[2])"
    ran = ALICE.run([PYTHON, "-I", "-c", script, str(victim), str(own_dir / "mine")])
    assert "PermissionError" in ran.err
    with contextlib.suppress(FileNotFoundError):
        victim.unlink()


DELAY_S: Final = 0.5
"""How long strace holds the job before it renames: a swap takes a hundredth of that."""


@pytest.mark.parametrize("round_number", range(3))
def test_sticky_directory_file_of_another_user_is_not_replaced_after_a_swap(
    daemon: Daemon, images_dir: Path, round_number: int
) -> None:
    """The destination was the caller's own when it was looked at, and is another's at the rename.

    The job is held there; the swap is that of two users, each of its own file.
    """
    shared = images_dir / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    image = simple_calls.file_of(ALICE, images_dir / "image.raw", HONEST)
    out = simple_calls.file_of(ALICE, shared / "out", b"old")
    theirs = simple_calls.file_of(BOB, shared / "bobs", f"precious {round_number}".encode())
    before = theirs.stat()
    request = conversion(image, out, source_format="raw", dest_format="raw", overwrite=True)
    hold = f"/^rename:delay_enter={int(DELAY_S * 1e6)}"
    with Tracer(daemon.traced(), hold):
        call = daemon.agent(ALICE).convert(request)
        job = daemon.await_one(JOB)
        waiting.until(lambda: processes.is_about_to_rename(job), "the job is about to rename")
        assert ALICE.run(["mv", str(out), str(shared / "aside")]).status == 0
        assert BOB.run(["mv", str(theirs), str(out)]).status == 0
        answer = simple_calls.outcome_of(call)
        daemon.await_idle()
    assert answer.reason == "NOT_YOURS"
    assert os.path.samestat(out.stat(), before)
    assert out.read_bytes() == f"precious {round_number}".encode()
    assert sorted(os.listdir(shared)) == ["aside", "out"]


def test_sticky_directory_race_never_replaces_a_file_of_another_user(
    daemon: Daemon, images_dir: Path
) -> None:
    """As fast as two users can swap their files under one name; nothing of either is lost."""
    shared = images_dir / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    image = simple_calls.file_of(ALICE, images_dir / "image.raw", HONEST)
    precious = simple_calls.file_of(BOB, shared / "bobs", b"precious").stat()
    simple_calls.file_of(ALICE, shared / "alices", b"old")
    out = shared / "out"
    ends: Counter[str] = Counter()
    with racing.taking_turns(shared, "out", (ALICE, "alices"), (BOB, "bobs")) as count:
        for _ in range(ROUNDS * 2):
            answer = simple_calls.overwrite(daemon, image, out)
            ends[answer.reason or answer.status] += 1
    print(count.changes, ends)  # noqa: T201 - the figures of a long run
    assert count.lost == 0
    assert count.changes > 2 * ROUNDS
    assert ends["NOT_YOURS"], "it was never another's: it tests nothing"
    assert ends.keys() <= {"OK", "NOT_YOURS", "NAME_REPLACED"}
    assert os.path.samestat((shared / "bobs").stat(), precious)
