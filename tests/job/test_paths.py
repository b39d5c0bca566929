"""From names to descriptors: what is opened, with whose rights, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import signal
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grants
import pytest
import refusals
from descriptors import none_left_open
from harness.mounts import Mounts

from convertd_core import conditions, values
from convertd_daemon.job import local_grant
from convertd_daemon.job.files import credentials, paths

CALLER = grants.CALLER
DATA = b"the image" * 1000

Make = Callable[[Path], object]


@pytest.fixture
def images(area: Path) -> Path:
    """A root of files with an image in it, root's own."""
    root = area / "images"
    (root / "sub").mkdir(parents=True)
    (root / "disk").write_bytes(DATA)
    (root / "disk").chmod(0o600)
    (root / "sub" / "disk").write_bytes(DATA)
    return root


def rules_of(root: Path, **changes: object) -> grants.Rules:
    """Whoever calls may read and write in that root."""
    return grants.Rules(roots=(grants.files(root, **changes),))


def make_socket(path: Path) -> None:
    """Put a socket there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def char_device(path: Path) -> None:
    """Put a character device there: /dev/zero, which has no end."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


def block_device(path: Path) -> None:
    """Put a block device there."""
    os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 250))


NO_IMAGES = [
    pytest.param(lambda path: path.mkdir(), "a directory", id="a-directory"),
    pytest.param(os.mkfifo, "a FIFO", id="a-fifo"),
    pytest.param(make_socket, "a socket", id="a-socket"),
    pytest.param(char_device, "a character device", id="a-character-device"),
    pytest.param(block_device, "a block device", id="a-block-device"),
]


class TestOpenSource:
    """What is read."""

    def opened(self, rules: grants.Rules, path: Path) -> bytes:
        """Open and read a source, and see that it is closed afterwards."""
        with paths.open_source(rules.place(str(path)), rules.peer) as source:
            assert source.size_bytes == os.fstat(source.fd).st_size
            assert source.allocated_bytes == os.fstat(source.fd).st_blocks * 512
            assert not os.get_inheritable(source.fd)
            assert fcntl.fcntl(source.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            data = os.pread(source.fd, 2 * len(DATA), 0)
        assert_closed(source.fd)
        return data

    def refusal(self, rules: grants.Rules, path: Path) -> conditions.Failure:
        """What a source is refused with; nothing is left open."""
        with none_left_open():
            failure = refusals.refusal_of(lambda: self.opened(rules, path))
        assert failure is not None
        return failure

    def test_source_is_opened_for_reading(self, images: Path) -> None:
        """In the root, and below it."""
        rules = rules_of(images)
        assert self.opened(rules, images / "disk") == DATA
        assert self.opened(rules, images / "sub" / "disk") == DATA

    @pytest.mark.parametrize(("make", "found"), NO_IMAGES)
    def test_source_that_is_not_a_regular_file_is_refused_unopened(
        self, images: Path, make: Make, found: str
    ) -> None:
        """Without being opened, so that nothing blocks and no device notices."""
        make(images / "odd")
        failure = self.refusal(rules_of(images), images / "odd")
        assert failure.message == f"{images}/odd: is {found}, not a regular file"

    @pytest.mark.parametrize("below", ["absent", "absent/disk", "disk/below-a-file", "sub/absent"])
    def test_missing_source_is_reported_as_missing(self, images: Path, below: str) -> None:
        """The caller may look there, so it may know."""
        failure = self.refusal(rules_of(images), images / below)
        assert failure.reason == "SOURCE_NOT_FOUND"
        assert failure.message == f"{images}/{below}: no such file"

    def test_source_in_a_missing_root_is_reported(self, area: Path) -> None:
        """It may be mounted later."""
        failure = self.refusal(rules_of(area / "absent"), area / "absent" / "disk")
        assert failure.reason == "SOURCE_NOT_FOUND"

    @pytest.mark.parametrize(
        ("link", "target", "below"),
        [
            pytest.param("link", "disk", "link", id="the-last-name-leading-inside"),
            pytest.param("link", "/etc/passwd", "link", id="the-last-name-leading-out"),
            pytest.param("link", "sub", "link/disk", id="on-the-way-leading-inside"),
            pytest.param("link", "/etc", "link/passwd", id="on-the-way-leading-out"),
            pytest.param("link", "..", "link/images/disk", id="on-the-way-leading-up"),
            pytest.param("link", "absent", "link", id="leading-nowhere"),
            pytest.param("link", "/proc/self/fd/0", "link", id="a-magic-link"),
        ],
    )
    def test_symlink_is_not_followed(
        self, images: Path, link: str, target: str, below: str
    ) -> None:
        """Wherever it leads: whoever made it may not be who asks."""
        (images / link).symlink_to(target)
        failure = self.refusal(rules_of(images), images / below)
        assert failure.reason == "SYMLINK_IN_PATH"

    def test_root_replaced_by_a_symlink_is_not_followed(self, area: Path, images: Path) -> None:
        """Nor is one above the root."""
        images.rename(area / "real")
        images.symlink_to("real")
        failure = self.refusal(rules_of(images), images / "disk")
        assert failure.reason == "SYMLINK_IN_PATH"
        nested = rules_of(images / "sub")
        assert self.refusal(nested, images / "sub" / "disk").reason == "SYMLINK_IN_PATH"

    def test_symlink_put_in_place_after_the_open_is_not_followed(self, images: Path) -> None:
        """The kernel resolves the name once, below the root, and we keep the handle."""
        rules = rules_of(images)
        with paths.open_source(rules.place(str(images / "disk")), CALLER) as source:
            (images / "disk").unlink()
            (images / "disk").symlink_to("/etc/passwd")
            assert os.pread(source.fd, 2 * len(DATA), 0) == DATA

    def test_mount_inside_the_root_is_not_entered_for_a_source(
        self, images: Path, mounts: Mounts
    ) -> None:
        """A user's FUSE could hold a job for ever; `mounts = true` trusts those who mount."""
        inside = mounts.in_memory("tmpfs", "images/mounted")
        (inside / "disk").write_bytes(DATA)
        failure = self.refusal(rules_of(images), inside / "disk")
        assert failure.reason == "OUTSIDE_ROOT"
        assert dict(failure.values) == {"path": f"{inside}/disk", "root": str(images)}
        assert self.opened(rules_of(images, mounts=True), inside / "disk") == DATA

    def test_source_with_a_lease_is_refused_as_in_use(self, images: Path) -> None:
        """It would take the holder's leave, for which an open waits 45 seconds."""
        with leased(images / "disk"):
            assert self.refusal(rules_of(images), images / "disk").reason == "IMAGE_IN_USE"
        assert self.opened(rules_of(images), images / "disk") == DATA

    def test_path_may_contain_characters_special_to_shell_and_qemu(self, images: Path) -> None:
        """It never reaches either."""
        for name in ("a,b=c", "json:{}", "nbd:x", "new\nline", "quo'te\"", "-O", "ünï"):
            (images / name).write_bytes(DATA)
            assert self.opened(rules_of(images), images / name) == DATA

    def test_daemon_access_opens_any_source_in_the_root(self, images: Path) -> None:
        """Whosever it is: that is what `access = "daemon"` says."""
        os.chown(images / "disk", grants.OTHER_USER.uid, grants.OTHER_USER.gid)
        assert self.opened(rules_of(images), images / "disk") == DATA

    @pytest.mark.parametrize(
        ("owner", "group", "mode", "expected"),
        [
            (CALLER.uid, 0, 0o600, "done"),
            (CALLER.uid, 0, 0o000, "ACCESS_REFUSED"),
            (0, CALLER.gid, 0o640, "done"),
            (0, 1300, 0o640, "done"),
            (0, 1500, 0o640, "ACCESS_REFUSED"),
            (0, 0, 0o604, "done"),
            (0, 0, 0o600, "ACCESS_REFUSED"),
            (CALLER.uid, 0, 0o044, "ACCESS_REFUSED"),
        ],
    )
    def test_caller_access_opens_a_source_only_with_the_rights_of_the_caller(
        self, images: Path, owner: int, group: int, mode: int, expected: str
    ) -> None:
        """By uid, gid and every group that the kernel told at connect; the kernel decides."""
        os.chown(images / "disk", owner, group)
        (images / "disk").chmod(mode)
        rules = rules_of(images, access=values.RootAccess.CALLER)
        reason = refusals.reason_of(lambda: self.opened(rules, images / "disk"))
        assert reason == expected

    def test_permission_error_names_the_uid_that_was_used(self, images: Path) -> None:
        """The caller's, by number."""
        rules = rules_of(images, access=values.RootAccess.CALLER)
        failure = self.refusal(rules, images / "disk")
        refused = "the kernel refused access with the rights of uid 1234"
        assert failure.message == f"{images}/disk: {refused}"

    def test_unsearchable_directory_hides_whether_a_source_exists(self, images: Path) -> None:
        """What is there and what is not have one answer."""
        (images / "sub").chmod(0o700)
        rules = rules_of(images, access=values.RootAccess.CALLER)
        for name in ("disk", "absent"):
            assert self.refusal(rules, images / "sub" / name).reason == "ACCESS_REFUSED"

    def test_local_grant_follows_symlinks_to_a_source(self, area: Path, images: Path) -> None:
        """Without a daemon nobody else's rights could be led astray; magic links stay refused."""
        (area / "link").symlink_to(images)
        place = values.Place(
            root=local_grant.EVERYTHING, below=f"{area}/link/disk".removeprefix("/")
        )
        with paths.open_source(place, CALLER) as source:
            assert os.pread(source.fd, 2 * len(DATA), 0) == DATA
        magic = values.Place(root=local_grant.EVERYTHING, below="proc/self/fd/0")
        failure = refusals.refusal_of(lambda: paths.open_source(magic, CALLER).__enter__())
        assert failure is not None
        assert failure.reason == "SYMLINK_IN_PATH"

    def test_local_grant_does_not_open_a_source_that_is_not_a_regular_file(
        self, images: Path
    ) -> None:
        """A FIFO without a writer would hold whoever opens it."""
        os.mkfifo(images / "odd")
        place = values.Place(root=local_grant.EVERYTHING, below=f"{images}/odd".removeprefix("/"))
        reason = refusals.reason_of(lambda: paths.open_source(place, CALLER).__enter__())
        assert reason == "NOT_AN_IMAGE"

    def test_regular_file_is_not_opened_in_a_root_of_devices(self) -> None:
        """Nor does it say more than what it is."""
        with tempfile.TemporaryDirectory(dir=paths.DEVICES, prefix="convertd-test-") as directory:
            os.mkfifo(f"{directory}/odd")
            rules = grants.Rules(roots=(grants.devices(directory),))
            failure = self.refusal(rules, Path(directory) / "odd")
        assert failure.message == f"{directory}/odd: is a FIFO, not a block device"


class TestResolveDestination:
    """Where the result will be."""

    def opened(self, rules: grants.Rules, path: Path, **asked: object) -> paths.Target:
        """Open a target, and see that it is closed afterwards."""
        request = grants.to(grants.request(path.parent / "never-read", path), **asked)
        with paths.open_target(rules.convert(request)) as target:
            assert os.path.samestat(os.fstat(target.directory), path.parent.stat())
            # fsync(2) takes it, which it would not if it were open as a mere path.
            os.fsync(target.directory)
            assert target.name == path.name
            assert os.pread(target.mount_table, 10, 0)
        assert_closed(target.directory)
        assert_closed(target.mount_table)
        return target

    def refusal(self, rules: grants.Rules, path: Path, **asked: object) -> conditions.Failure:
        """What a target is refused with; nothing is left open."""
        with none_left_open():
            failure = refusals.refusal_of(lambda: self.opened(rules, path, **asked))
        assert failure is not None
        return failure

    def test_free_destination_name_is_accepted(self, images: Path) -> None:
        """In the root, and below it."""
        rules = rules_of(images)
        assert self.opened(rules, images / "new").existing is None
        assert self.opened(rules, images / "sub" / "new").existing is None

    @pytest.mark.parametrize("below", ["absent/new", "disk/new"])
    def test_missing_destination_directory_is_not_created(self, images: Path, below: str) -> None:
        """It is named."""
        failure = self.refusal(rules_of(images), images / below)
        parent = below.partition("/")[0]
        assert failure.message == f"{images}/{parent}: the directory does not exist"

    def test_symlink_in_the_path_is_not_followed(self, images: Path) -> None:
        """Wherever it leads."""
        (images / "link").symlink_to("sub")
        failure = self.refusal(rules_of(images), images / "link" / "new")
        assert failure.reason == "SYMLINK_IN_PATH"

    def test_mount_inside_the_root_is_not_entered_for_a_destination(
        self, images: Path, mounts: Mounts
    ) -> None:
        """Unless the policy trusts those who mount there."""
        inside = mounts.in_memory("tmpfs", "images/mounted")
        assert self.refusal(rules_of(images), inside / "new").reason == "OUTSIDE_ROOT"
        assert self.opened(rules_of(images, mounts=True), inside / "new").existing is None

    def test_existing_destination_is_refused_unless_overwriting_is_allowed(
        self, images: Path
    ) -> None:
        """Nothing is opened of it."""
        failure = self.refusal(rules_of(images), images / "disk")
        assert failure.reason == "DEST_EXISTS"

    @pytest.mark.parametrize(
        ("overwrite", "owner", "expected"),
        [
            (values.OverwriteScope.OWN, CALLER.uid, "done"),
            (values.OverwriteScope.OWN, 0, "NOT_YOURS"),
            (values.OverwriteScope.ANY, 0, "done"),
        ],
    )
    def test_overwrite_setting_of_the_policy_decides_whose_file_is_replaceable(
        self, images: Path, overwrite: values.OverwriteScope, owner: int, expected: str
    ) -> None:
        """One's own, or anybody's."""
        os.chown(images / "disk", owner, 0)
        rules = dataclasses.replace(rules_of(images), overwrite=overwrite)
        reason = refusals.reason_of(lambda: self.opened(rules, images / "disk", overwrite=True))
        assert reason == expected

    @pytest.mark.parametrize(("make", "found"), NO_IMAGES)
    def test_destination_that_is_not_a_regular_file_is_never_replaced(
        self, images: Path, make: Make, found: str
    ) -> None:
        """Nor is it opened."""
        make(images / "odd")
        rules = dataclasses.replace(rules_of(images), overwrite=values.OverwriteScope.ANY)
        failure = self.refusal(rules, images / "odd", overwrite=True)
        assert failure.message == f"{images}/odd: is {found}, not a regular file"

    def test_destination_that_is_a_symlink_is_neither_replaced_nor_followed(
        self, images: Path
    ) -> None:
        """Nor is what it leads to."""
        (images / "link").symlink_to("disk")
        rules = dataclasses.replace(rules_of(images), overwrite=values.OverwriteScope.ANY)
        failure = self.refusal(rules, images / "link", overwrite=True)
        assert failure.reason == "SYMLINK_IN_PATH"

    def test_destination_that_is_a_mount_point_is_not_entered(self, images: Path) -> None:
        """A file can be one, too; who so much as asks for its size may wait for ever."""
        rules = dataclasses.replace(rules_of(images), overwrite=values.OverwriteScope.ANY)
        (images / "point").touch()
        with bound(images / "disk", images / "point"):
            failure = self.refusal(rules, images / "point", overwrite=True)
        assert failure.reason == "OUTSIDE_ROOT"

    def test_destination_with_a_lease_is_refused_without_waiting(self, images: Path) -> None:
        """As for a source."""
        rules = dataclasses.replace(rules_of(images), overwrite=values.OverwriteScope.ANY)
        with leased(images / "disk"):
            failure = self.refusal(rules, images / "disk", overwrite=True)
        assert failure.reason == "IMAGE_IN_USE"

    @pytest.mark.parametrize("byte", [paths.QEMU_LOCKS[0], 150, paths.QEMU_LOCKS[1]])
    def test_destination_locked_by_a_running_qemu_is_not_replaced(
        self, images: Path, byte: int
    ) -> None:
        """Its locks are on these bytes; it would go on writing into the void."""
        rules = dataclasses.replace(rules_of(images), overwrite=values.OverwriteScope.ANY)
        with (images / "disk").open("r+b") as theirs:
            flock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(theirs, fcntl.F_OFD_SETLK, flock)
            failure = self.refusal(rules, images / "disk", overwrite=True)
            assert failure.reason == "IMAGE_IN_USE"
        assert self.opened(rules, images / "disk", overwrite=True).existing is not None

    def test_unrelated_locks_on_the_destination_are_ignored(self, images: Path) -> None:
        """flock(2), or on other bytes."""
        rules = dataclasses.replace(rules_of(images), overwrite=values.OverwriteScope.ANY)
        with (images / "disk").open("r+b") as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX)
            fcntl.lockf(theirs, fcntl.LOCK_EX, 1, paths.QEMU_LOCKS[1] + 1)
            assert self.opened(rules, images / "disk", overwrite=True).existing is not None

    def test_destination_in_a_setgid_directory_gets_its_group(self, images: Path) -> None:
        """As open(2) would."""
        assert self.opened(rules_of(images), images / "new").setgid_group is None
        os.chown(images, 0, 1400)
        images.chmod(0o2755)
        assert self.opened(rules_of(images), images / "new").setgid_group == 1400

    def test_unsearchable_directory_hides_whether_a_destination_exists(self, images: Path) -> None:
        """Whether there is such a file is not to be learnt by asking to write it."""
        (images / "sub").chmod(0o744)
        rules = rules_of(images, access=values.RootAccess.CALLER)
        for name in ("disk", "absent"):
            assert self.refusal(rules, images / "sub" / name).reason == "ACCESS_REFUSED"

    def test_unsearchable_directory_hides_the_directories_below_it(self, images: Path) -> None:
        """Though it could write there, if it came that far."""
        (images / "sub" / "deep").mkdir()
        (images / "sub" / "deep").chmod(0o777)
        (images / "sub").chmod(0o700)
        rules = rules_of(images, access=values.RootAccess.CALLER)
        for name in ("deep", "absent"):
            failure = self.refusal(rules, images / "sub" / name / "new")
            assert failure.reason == "ACCESS_REFUSED"

    def test_local_grant_follows_a_symlink_in_the_destination_path(
        self, area: Path, images: Path
    ) -> None:
        """As every other program would."""
        (area / "link").symlink_to("images")
        place = values.Place(
            root=local_grant.EVERYTHING, below=f"{area}/link/new".removeprefix("/")
        )
        grant = rules_of(images).convert(grants.request(images / "a", images / "b"))
        with paths.open_target(dataclasses.replace(grant, dest=place)) as target:
            assert os.path.samestat(os.fstat(target.directory), images.stat())


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, "SOURCE_NOT_FOUND"),
        (errno.ENOTDIR, "SOURCE_NOT_FOUND"),
        (errno.ELOOP, "SYMLINK_IN_PATH"),
        (errno.EXDEV, "OUTSIDE_ROOT"),
        (errno.EACCES, "ACCESS_REFUSED"),
        (errno.EPERM, "ACCESS_REFUSED"),
        (errno.EAGAIN, "IMAGE_IN_USE"),
        (errno.ETXTBSY, "IMAGE_IN_USE"),
        (errno.EBUSY, "IMAGE_IN_USE"),
        (errno.EIO, "READ_FAILED"),
        (errno.ENXIO, "READ_FAILED"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_each_errno_of_open_becomes_a_condition(number: int, expected: str) -> None:
    """With its own words where there is no better one."""
    place = grants.Rules(roots=(grants.files("/images"),)).place("/images/a")
    absent = conditions.SourceNotFound(path=place.path)
    error = OSError(number, os.strerror(number))
    failure = refusals.refusal_of(lambda: paths.raise_for(error, place, CALLER, absent))
    assert failure is not None
    assert failure.reason == expected
    assert "/images/a" in failure.message


def test_unknown_file_type_has_a_name() -> None:
    """Even one that Linux does not have yet."""
    place = grants.Rules(roots=(grants.files("/images"),)).place("/images/a")
    odd = os.stat_result((0o030000, *[0] * 9))
    failure = refusals.refusal_of(lambda: paths.check_kind(place, odd))
    assert failure is not None
    assert failure.message == "/images/a: is something else, not a regular file"


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (values.RootAccess.DAEMON, "the daemon"),
        (values.RootAccess.CALLER, "uid 1234"),
        (None, "uid 0"),
    ],
)
def test_rights_in_force_are_described(access: values.RootAccess | None, expected: str) -> None:
    """For a message."""
    assert credentials.describe_rights(grants.files("/images", access=access), CALLER) == expected


def assert_closed(descriptor: int) -> None:
    """See that a descriptor is closed."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@contextlib.contextmanager
def bound(file: Path, point: Path) -> Iterator[None]:
    """Mount a file over another one."""
    subprocess.run(["mount", "--bind", str(file), str(point)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(point)], check=True)


@contextlib.contextmanager
def leased(path: Path) -> Iterator[None]:
    """Hold a lease on a file. Who else opens it makes the kernel tell us by SIGIO."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with path.open("r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
    finally:
        signal.signal(signal.SIGIO, before)
