"""Real qemu-img in the sandbox: it works, as whom it should, on every Landlock."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import descriptors
import pytest
from children import in_child

from convertd_daemon.linux import prctl
from convertd_daemon.sandbox import (
    confine,
    confine_broker,
    identity,
    landlock,
    limits,
    spawn,
)
from convertd_daemon.sandbox.spawn import Confinement, Identity

WORKER = Identity(uid=1500, gid=1500)
CALLER = Identity(uid=1234, gid=1234)
OTHER = 4321
SIZE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A source of random bytes, and an unnamed inode in a directory of its own."""

    directory: Path
    source: int
    dest: int
    dest_directory: int

    def convert(
        self, program: int, confinement: Confinement, options: Sequence[str] = ("-O", "qcow2")
    ) -> tuple[int, str]:
        """Run raw to qcow2 in the sandbox; give the status and what stderr said."""
        ends = [f"/proc/self/fd/{number}" for number in (self.source, self.dest)]
        argv = ["qemu-img", "convert", "-f", "raw", "-m", "16", "-W", *options, *ends]
        inherit = (self.source, self.dest)
        with spawn.spawn(program, argv, confinement=confinement, inherit=inherit) as child:
            return finish(child)

    def same(self, dest_format: str = "qcow2") -> bool:
        """Compare the result with the source, outside of any sandbox."""
        paths = [f"/proc/{os.getpid()}/fd/{number}" for number in (self.source, self.dest)]
        compare = ["qemu-img", "compare", "-f", "raw", "-F", dest_format, *paths]
        return subprocess.run(compare, check=False, capture_output=True).returncode == 0


def finish(child: spawn.ConfinedProgram) -> tuple[int, str]:
    """Read stderr to its end, then reap."""
    text = b""
    while select.select([child.stderr], [], [])[0]:
        if not (more := os.read(child.stderr, 65536)):
            break
        text += more
    return child.wait(), text.decode()


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    """Give a source that only OTHER may read, and a dest that the worker's group may write."""
    with contextlib.ExitStack() as undo:
        (tmp_path / "source").write_bytes(os.urandom(SIZE))
        os.chown(tmp_path / "source", OTHER, OTHER)
        (tmp_path / "source").chmod(0o600)
        directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        undo.callback(os.close, directory)
        source = os.open(tmp_path / "source", os.O_RDONLY)
        undo.callback(os.close, source)
        dest = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
        undo.callback(os.close, dest)
        os.fchown(dest, CALLER.uid, WORKER.gid)
        os.fchmod(dest, 0o060)
        yield Images(directory=tmp_path, source=source, dest=dest, dest_directory=directory)


@pytest.fixture
def confinement(images: Images, compiled: bytes) -> Confinement:
    """Give what the daemon gives a conversion whose source is another's."""
    return Confinement(
        identity=WORKER,
        keep_read_search=True,
        read=(images.source,),
        write=(images.dest,),
        filter=compiled,
    )


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6, None])
def test_sandboxed_qemu_img_converts_a_private_image_of_another_user(
    images: Images, qemu_img: int, confinement: Confinement, abi: int | None
) -> None:
    """By a uid that is neither owner nor root, with CAP_DAC_READ_SEARCH alone."""
    older = dataclasses.replace(confinement, abi=abi)
    assert in_child(lambda: images.convert(qemu_img, older)) == (0, "")
    assert images.same()


FORMATS = (
    "raw",
    "raw -o preallocation=falloc",
    "raw -S 0",
    "raw -t none -T none",
    "qcow2 -c",
    "qcow2 -c -o compression_type=zstd",
    "qcow2 -o preallocation=metadata",
    "qcow2 -o preallocation=full",
    "qcow2 -o cluster_size=2M,extended_l2=on",
    "qcow2 -o compat=0.10",
    "qcow2 -t none -T none",
    "qed",
    "vdi",
    "vhdx",
    "vpc -o force_size=on",
    "parallels",
    "vmdk -o subformat=streamOptimized",
)


@pytest.mark.parametrize("options", FORMATS)
def test_sandboxed_qemu_img_writes_every_format(
    images: Images, qemu_img: int, confinement: Confinement, options: str
) -> None:
    """Nothing that a conversion needs is refused."""
    arguments = ["-O", *options.split()]
    assert in_child(lambda: images.convert(qemu_img, confinement, arguments)) == (0, "")
    assert images.same(arguments[1])


def test_sandboxed_qemu_img_without_the_capability_reads_no_private_image(
    images: Images, qemu_img: int, confinement: Confinement
) -> None:
    """The inode's own permission counts, though the descriptor is open."""
    without = dataclasses.replace(confinement, keep_read_search=False)
    status, complaint = in_child(lambda: images.convert(qemu_img, without))
    assert status == 1
    assert "Permission denied" in complaint


def test_sandboxed_qemu_img_with_the_capability_reads_only_named_files(
    images: Images, qemu_img: int, confinement: Confinement
) -> None:
    """Landlock holds what the capability would open."""
    unnamed = dataclasses.replace(confinement, read=())
    status, complaint = in_child(lambda: images.convert(qemu_img, unnamed))
    assert status == 1
    assert "Permission denied" in complaint


def test_sandboxed_qemu_img_can_not_write_a_source(
    images: Images, qemu_img: int, confinement: Confinement
) -> None:
    """A dest that was named for reading only."""
    reading = dataclasses.replace(confinement, read=(images.source, images.dest), write=())
    status, complaint = in_child(lambda: images.convert(qemu_img, reading))
    assert status == 1
    assert "Permission denied" in complaint


def test_unprivileged_user_converts_with_own_rights_in_the_sandbox(
    images: Images, qemu_img: int, compiled: bytes
) -> None:
    """No root, no daemon, no capability."""
    for inode in (images.source, images.dest):
        os.fchown(inode, CALLER.uid, CALLER.gid)
        os.fchmod(inode, 0o600)
    own = Confinement(identity=None, read=(images.source,), write=(images.dest,), filter=compiled)

    def act() -> tuple[int, str]:
        identity.assume(CALLER)
        identity.limit_capabilities(())
        return images.convert(qemu_img, own)

    assert in_child(act) == (0, "")
    assert images.same()


def test_sandboxed_qemu_img_works_inside_a_job_of_a_narrowed_broker(
    images: Images, qemu_img: int, confinement: Confinement
) -> None:
    """Layers intersect, and the job may publish afterwards."""

    def act() -> tuple[tuple[int, str], list[str]]:
        confine_broker.narrow_broker()
        rules = (
            landlock.Rule(where=images.source, access=landlock.READ),
            landlock.Rule(where=images.dest_directory, access=landlock.PUBLISH_IN),
        )
        confine.confine_job(qemu_img, rules)
        outcome = images.convert(qemu_img, confinement)
        name = f"/proc/self/fd/{images.dest}"
        os.link(name, "result", dst_dir_fd=images.dest_directory, follow_symlinks=True)
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except PermissionError:
            return outcome, sorted(os.listdir(images.dest_directory))
        return outcome, ["/etc/passwd was opened"]

    assert in_child(act) == ((0, ""), ["result", "source"])
    assert images.same()


def test_sandboxed_qemu_img_info_reports_the_format(
    images: Images, qemu_img: int, compiled: bytes
) -> None:
    """On stdout, which is a pipe to us."""
    os.fchmod(images.dest, 0o640)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "vmdk", images.directory / "a", "1M"], check=True
    )
    image = os.open(images.directory / "a", os.O_RDONLY)
    only = Confinement(identity=WORKER, read=(image,), filter=compiled, limits=limits.INFO)

    def act() -> str:
        argv = ["qemu-img", "info", "--output=json", f"/proc/self/fd/{image}"]
        with spawn.spawn(qemu_img, argv, confinement=only, inherit=(image,)) as child:
            status, complaint = finish(child)
            assert (status, complaint) == (0, "")
            return os.read(child.stdout, 65536).decode()

    assert json.loads(in_child(act))["format"] == "vmdk"


def test_sandboxed_qemu_img_does_not_open_a_backing_file_without_a_rule(
    images: Images, qemu_img: int, confinement: Confinement
) -> None:
    """An image can't name a file that it may not read."""
    overlay = images.directory / "overlay"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw"]
    subprocess.run([*create, overlay, "1M"], check=True)
    image = os.open(overlay, os.O_RDONLY)
    both = dataclasses.replace(confinement, read=(image,))

    def act() -> tuple[int, str]:
        ends = [f"/proc/self/fd/{number}" for number in (image, images.dest)]
        argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", *ends]
        inherit = (image, images.dest)
        with spawn.spawn(qemu_img, argv, confinement=both, inherit=inherit) as child:
            return finish(child)

    status, complaint = in_child(act)
    assert status == 1
    assert "Could not open '/etc/shadow': Permission denied" in complaint


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """Give a real block device, of the worker's group as disks are of theirs."""
    (tmp_path / "disk").write_bytes(bytes(2 * SIZE))
    losetup = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    try:
        owner = os.stat(device)
        os.chown(device, 0, WORKER.gid)
        os.chmod(device, 0o660)  # as udev makes disks
        yield device
        os.chown(device, owner.st_uid, owner.st_gid)
        os.chmod(device, stat.S_IMODE(owner.st_mode))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("direct", [False, True], ids=["writeback", "none"])
def test_sandboxed_qemu_img_writes_a_block_device(
    images: Images,
    qemu_img: int,
    confinement: Confinement,
    loop_device: str,
    *,
    direct: bool,
) -> None:
    """With the ioctl(2)s that it takes to ask for its size."""
    device = os.open(loop_device, os.O_RDWR)
    with_device = dataclasses.replace(confinement, write=(), devices=(device,))

    def act() -> tuple[int, str]:
        graph = {"driver": "raw", "file": {"driver": "host_device"}}
        graph["file"]["filename"] = f"/proc/self/fd/{device}"  # type: ignore[index]
        ends = [f"/proc/self/fd/{images.source}", f"json:{json.dumps(graph)}"]
        cache = ["-t", "none"] if direct else ["-t", "writeback"]
        argv = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", *cache, *ends]
        inherit = (images.source, device)
        with spawn.spawn(qemu_img, argv, confinement=with_device, inherit=inherit) as child:
            return finish(child)

    assert in_child(act) == (0, "")
    os.fsync(device)
    assert os.pread(device, SIZE, 0) == os.pread(images.source, SIZE, 0)
    os.close(device)


def test_leaving_the_context_kills_and_reaps_the_program(
    images: Images, qemu_img: int, confinement: Confinement
) -> None:
    """And closes what it gave."""

    def act() -> tuple[int, list[str], set[tuple[int, str]]]:
        confine_broker.narrow_broker()
        before = descriptors.open_descriptors()
        argv = ["qemu-img", "bench", "-f", "raw", "-c", "1000000000"]
        argv.append(f"/proc/self/fd/{images.source}")
        inherit = (images.source,)
        with spawn.spawn(qemu_img, argv, confinement=confinement, inherit=inherit) as child:
            assert not select.select([child.pidfd], [], [], 0)[0]
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            left = []
        else:
            left = ["a child"]
        return child.wait(), left, descriptors.open_descriptors() - before

    assert in_child(act) == (-signal.SIGKILL, [], set())


def test_ended_child_can_be_killed_and_waited_for_again(
    qemu_img: int, confinement: Confinement
) -> None:
    """Nobody else is hit."""

    def act() -> list[int]:
        with spawn.spawn(qemu_img, ["qemu-img", "--version"], confinement=confinement) as child:
            select.select([child.pidfd], [], [])
            child.kill()
            first = child.wait()
            child.kill()
            return [first, child.wait()]

    assert in_child(act) == [0, 0]


@pytest.mark.parametrize("read_search", [False, True], ids=["no capability", "one capability"])
def test_sandboxed_program_dies_with_the_process_that_started_it(
    images: Images, qemu_img: int, confinement: Confinement, *, read_search: bool
) -> None:
    """By the kernel's doing, across uids, with the broker's capabilities."""
    changed = dataclasses.replace(confinement, keep_read_search=read_search)
    os.fchmod(images.source, 0o644)

    def act() -> int:
        confine_broker.narrow_broker()
        prctl.set_child_subreaper()
        read_end, write_end = os.pipe()
        job = os.fork()
        if job == 0:
            argv = ["qemu-img", "bench", "-f", "raw", "-c", "1000000000"]
            argv.append(f"/proc/self/fd/{images.source}")
            child = spawn.spawn(qemu_img, argv, confinement=changed, inherit=(images.source,))
            os.write(write_end, str(child.pid).encode())
            signal.pause()
        pid = int(os.read(read_end, 99))
        os.kill(job, signal.SIGKILL)
        os.waitpid(job, 0)
        return os.waitpid(pid, 0)[1]

    assert in_child(act) == signal.SIGKILL
