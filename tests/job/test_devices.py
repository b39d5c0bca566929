"""Block devices, as source and as destination: real ones, of both sizes of sectors."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grants
import loop_devices
import pytest
import refusals
import whole_job
from harness.mounts import Mounts
from loop_devices import DISK_GROUP, Devices

from convertd_core import conditions, values
from convertd_daemon import channel
from convertd_daemon.job import context, endpoints
from convertd_daemon.job.files import destination, device_dest, paths

MIB = 1024 * 1024
SIZE = 8 * MIB

WORKER = whole_job.WORKER


@pytest.fixture
def volumes(area: Path, mounts: Mounts) -> Iterator[Devices]:  # noqa: ARG001 - unmounted last
    """Devices, and a directory of names for them."""
    with loop_devices.made(area) as made:
        yield made


def rules_of(volumes: Devices, **changes: object) -> grants.Rules:
    """Who may read and write files, and devices under their names."""
    return grants.Rules(
        roots=(
            grants.files(volumes.directory),
            grants.devices(volumes.links, **{"allow_is_zero": True, **changes}),
        )
    )


def image(volumes: Devices, size_bytes: int, image_format: str = "raw") -> Path:
    """An image with some data, a hole, and data to its last byte."""
    raw = volumes.directory / "source.raw"
    with raw.open("wb") as file:
        file.truncate(size_bytes)
        file.write(os.urandom(min(size_bytes, 256 * 1024)))
        file.seek(max(0, size_bytes - 4096))
        file.write(os.urandom(min(size_bytes, 4096)))
    if image_format == "raw":
        return raw
    path = volumes.directory / f"source.{image_format}"
    argv = ["qemu-img", "convert", "-f", "raw", "-O", image_format, str(raw), str(path)]
    subprocess.run(argv, check=True)
    return path


def converted(
    volumes: Devices, source: Path, dest: Path, source_format: str = "raw", **asked: object
) -> whole_job.JobEvents:
    """Convert, by a whole job."""
    request = grants.to(grants.request(source, dest, source_format), **asked)
    return whole_job.run(rules_of(volumes).convert(request))


class TestWritingADevice:
    """A device as the destination."""

    @pytest.mark.parametrize("sector_bytes", [512, 4096])
    @pytest.mark.parametrize("source_format", ["raw", "qcow2"])
    def test_device_keeps_no_data_of_its_previous_content(
        self, volumes: Devices, sector_bytes: int, source_format: str
    ) -> None:
        """The image from the first byte to its last, and zeroes to the device's end."""
        device = volumes.add("lv", SIZE, sector_bytes=sector_bytes)
        source = image(volumes, 2 * MIB, source_format)
        outcome = converted(volumes, source, device, source_format)
        assert outcome.published.published
        expected = (volumes.directory / "source.raw").read_bytes()
        assert volumes.bytes_on(device) == expected.ljust(SIZE, b"\0")

    @pytest.mark.parametrize("sector_bytes", [512, 4096])
    @pytest.mark.parametrize("size", [512, 2 * MIB + 512, 2 * MIB + 3584, SIZE - 512])
    def test_device_with_larger_sectors_keeps_no_data_of_its_previous_content(
        self, volumes: Devices, sector_bytes: int, size: int
    ) -> None:
        """Disks of 512-byte sectors onto a device of larger ones."""
        device = volumes.add("lv", SIZE, sector_bytes=sector_bytes)
        source = image(volumes, size)
        assert converted(volumes, source, device).reason == "done"
        assert volumes.bytes_on(device) == source.read_bytes().ljust(SIZE, b"\0")

    @pytest.mark.parametrize("sector_bytes", [512, 4096])
    def test_image_that_exactly_fits_the_device_is_written(
        self, volumes: Devices, sector_bytes: int
    ) -> None:
        """To the last byte."""
        device = volumes.add("lv", SIZE, sector_bytes=sector_bytes)
        source = image(volumes, SIZE)
        assert converted(volumes, source, device).reason == "done"
        assert volumes.bytes_on(device) == source.read_bytes()

    def test_zero_ranges_of_the_image_are_written_to_the_device(self, volumes: Devices) -> None:
        """To qemu-img a hole is nothing to write, unless it is told that something is there."""
        device = volumes.add("lv", SIZE)
        source = volumes.directory / "zeroes"
        with source.open("wb") as file:
            file.truncate(SIZE)
        assert converted(volumes, source, device).reason == "done"
        assert volumes.bytes_on(device) == bytes(SIZE)

    def test_claimed_zero_device_is_not_zeroed_again(self, volumes: Devices) -> None:
        """A claim that is not true is its claimant's loss: here it shows what was not written."""
        device = volumes.add("lv", SIZE)
        source = image(volumes, 2 * MIB)
        assert converted(volumes, source, device, is_zero=True).reason == "done"
        found = volumes.bytes_on(device)
        assert found[: 256 * 1024] == source.read_bytes()[: 256 * 1024]
        assert found[MIB : MIB + 4096] == b"\xaa" * 4096
        assert found[2 * MIB :] == b"\xaa" * (SIZE - 2 * MIB)

    def test_device_is_verified_up_to_the_end_of_the_image(self, volumes: Devices) -> None:
        """What lies beyond is not the image's."""
        device = volumes.add("lv", SIZE)
        request = grants.request(image(volumes, 2 * MIB, "qcow2"), device, "qcow2")
        grant = rules_of(volumes).convert(dataclasses.replace(request, verify=True))
        assert whole_job.run(grant).published.verified

    def test_device_that_is_too_small_is_refused_before_a_write(self, volumes: Devices) -> None:
        """With both sizes."""
        device = volumes.add("lv", MIB)
        outcome = converted(volumes, image(volumes, MIB + 512), device)
        assert outcome.failure is not None
        assert outcome.reason == "DEVICE_TOO_SMALL"
        assert outcome.failure.message == f"{device}: has 1048576 bytes, the image needs 1049088"
        assert volumes.bytes_on(device) == b"\xaa" * MIB

    def test_validation_does_not_write_the_device(self, volumes: Devices) -> None:
        """The plan is told, with the device's size as the room there is."""
        device = volumes.add("lv", SIZE)
        request = grants.request(image(volumes, MIB), device)
        grant = rules_of(volumes).convert(dataclasses.replace(request, validate_only=True))
        outcome = whole_job.run(grant)
        assert not outcome.published.published
        assert outcome.published.bytes_per_second == 0.0
        assert (outcome.plan.needed_bytes, outcome.plan.available_bytes) == (0, SIZE)
        assert volumes.bytes_on(device) == b"\xaa" * SIZE

    def test_failed_write_to_a_device_reports_its_content_as_undefined(
        self, volumes: Devices, mounts: Mounts
    ) -> None:
        """A thin volume that runs full: it has the size, but not the room."""
        thin = mounts.in_memory("tmpfs", "thin", "mode=755,size=1m")
        device = Devices(thin, volumes.links, volumes.undo).add("lv", SIZE, dirty=False)
        source = image(volumes, 4 * MIB)
        source.write_bytes(os.urandom(4 * MIB))
        outcome = converted(volumes, source, device)
        assert outcome.failure is not None
        assert outcome.failure.status is conditions.Status.DATA_LOSS
        assert outcome.failure.message.endswith(f"; the content of {device} is undefined now")
        assert dict(outcome.failure.values)["device_content"] == "undefined"


class TestRefusals:
    """Which devices are not written."""

    def test_mounted_device_is_refused(self, volumes: Devices) -> None:
        """It holds somebody's files."""
        device = volumes.add("lv", 32 * MIB, dirty=False)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
        point = volumes.directory / "point"
        point.mkdir()
        subprocess.run(["mount", str(device), str(point)], check=True)
        try:
            assert converted(volumes, image(volumes, MIB), device).reason == "IMAGE_IN_USE"
            assert converted(volumes, device, volumes.directory / "o").reason == "IMAGE_IN_USE"
        finally:
            subprocess.run(["umount", str(point)], check=True)
        assert converted(volumes, device, volumes.directory / "o").reason == "done"

    def test_device_opened_exclusively_by_another_process_is_refused(
        self, volumes: Devices
    ) -> None:
        """A volume manager, another conversion: with O_EXCL, as we do."""
        device = volumes.add("lv", SIZE)
        holder = os.open(device, os.O_RDONLY | os.O_EXCL)
        assert converted(volumes, image(volumes, MIB), device).reason == "IMAGE_IN_USE"
        assert converted(volumes, device, volumes.directory / "o").reason == "IMAGE_IN_USE"
        os.close(holder)
        assert converted(volumes, image(volumes, MIB), device).reason == "done"

    def test_missing_device_is_not_created(self, volumes: Devices) -> None:
        """A file in its place would fill /dev."""
        outcome = converted(volumes, image(volumes, MIB), volumes.links / "gone")
        assert outcome.reason == "SOURCE_NOT_FOUND"
        assert os.listdir(volumes.links) == []

    def test_device_name_that_is_a_dangling_symlink_is_not_created(self, volumes: Devices) -> None:
        """As udev leaves one for a moment."""
        (volumes.links / "lv").symlink_to("../no-such-device")
        outcome = converted(volumes, image(volumes, MIB), volumes.links / "lv")
        assert outcome.reason == "SOURCE_NOT_FOUND"
        assert not os.path.exists("/dev/no-such-device")

    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            ("/etc/passwd", "OUTSIDE_ROOT"),
            ("../../etc/passwd", "OUTSIDE_ROOT"),
            ("../null", "NOT_AN_IMAGE"),
            ("../shm", "NOT_AN_IMAGE"),
            ("../fd/3", "OUTSIDE_ROOT"),
        ],
    )
    def test_device_name_that_links_to_something_else_is_refused(
        self, volumes: Devices, target: str, expected: str
    ) -> None:
        """Links are followed below /dev, and what is found must be a block device."""
        (volumes.links / "lv").symlink_to(target)
        outcome = converted(volumes, image(volumes, MIB), volumes.links / "lv")
        assert outcome.reason == expected

    def test_regular_file_in_a_root_of_devices_is_refused(self, volumes: Devices) -> None:
        """Somebody put it into /dev."""
        (volumes.links / "lv").write_bytes(b"x")
        outcome = converted(volumes, image(volumes, MIB), volumes.links / "lv")
        assert outcome.failure is not None
        assert outcome.failure.message.endswith("is a regular file, not a block device")

    @pytest.mark.parametrize(
        ("group", "mode"), [(DISK_GROUP, 0o640), (DISK_GROUP, 0o600), (0, 0o660)]
    )
    def test_device_its_group_may_not_write_is_refused(
        self, volumes: Devices, group: int, mode: int
    ) -> None:
        """The worker gets the device's group, no capability, and never root's group."""
        device = volumes.add("lv", SIZE)
        os.chown(device, 0, group)
        os.chmod(device, mode)
        outcome = converted(volumes, image(volumes, MIB), device)
        assert outcome.failure is not None
        assert outcome.reason == "DEVICE_NOT_WRITABLE"
        assert (
            f"the group {group} of the device may not write to it (mode 0{mode:o})"
            in outcome.failure.message
        )
        assert volumes.bytes_on(device) == b"\xaa" * SIZE

    def test_destination_format_other_than_raw_is_refused_for_a_device(
        self, volumes: Devices
    ) -> None:
        """What is on a device is its content."""
        device = volumes.add("lv", SIZE)
        outcome = converted(volumes, image(volumes, MIB), device, format="qcow2")
        assert outcome.reason == "UNSUPPORTED"
        assert volumes.bytes_on(device) == b"\xaa" * SIZE

    def test_caller_access_refuses_a_device_the_caller_may_not_open(self, volumes: Devices) -> None:
        """Access = caller, on a device as on a file."""
        device = volumes.add("lv", SIZE)
        rules = rules_of(volumes, access=values.RootAccess.CALLER)
        request = grants.request(image(volumes, MIB), device)
        grant = rules.convert(request)
        assert whole_job.run(grant).reason == "ACCESS_REFUSED"
        os.chown(device, 0, 1300)
        assert whole_job.run(grant).reason == "done"

    def test_device_that_is_the_source_under_another_name_is_refused(
        self, volumes: Devices
    ) -> None:
        """An image that is converted onto itself is lost."""
        device = volumes.add("lv", SIZE)
        source = image(volumes, MIB, "qcow2")
        content = source.read_bytes()
        with device.open("r+b") as file:
            file.write(content)
        (volumes.links / "alias").symlink_to(os.readlink(device))
        outcome = converted(volumes, device, volumes.links / "alias", "qcow2")
        assert outcome.failure is not None
        assert outcome.failure.message.endswith("/alias' is the source")
        assert volumes.bytes_on(device)[: len(content)] == content

    def test_device_that_is_the_backing_file_of_the_source_is_refused(
        self, volumes: Devices
    ) -> None:
        """A snapshot that is converted onto its own base is lost, too."""
        device = volumes.add("lv", SIZE)
        overlay = volumes.directory / "overlay"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(device), "-F", "raw"]
        subprocess.run([*argv, str(overlay)], check=True)
        write = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", str(overlay)]
        subprocess.run(write, check=True, capture_output=True)
        outcome = converted(volumes, overlay, device, "qcow2")
        assert outcome.failure is not None
        assert outcome.reason == "BACKING_REFUSED"
        assert "undefined" not in outcome.failure.message
        assert volumes.bytes_on(device) == b"\xaa" * SIZE


class TestReadingADevice:
    """A device as the source."""

    @pytest.mark.parametrize("sector_bytes", [512, 4096])
    def test_source_device_is_read_in_full(self, volumes: Devices, sector_bytes: int) -> None:
        """Its size is the disk's."""
        device = volumes.add("lv", 2 * MIB, sector_bytes=sector_bytes)
        device.write_bytes(os.urandom(2 * MIB))
        outcome = converted(volumes, device, volumes.directory / "out")
        assert outcome.published.virtual_size_bytes == 2 * MIB
        assert (volumes.directory / "out").read_bytes() == volumes.bytes_on(device)

    def test_source_device_may_hold_an_image_of_another_format(self, volumes: Devices) -> None:
        """A qcow2 on a volume."""
        device = volumes.add("lv", SIZE, dirty=False)
        source = image(volumes, MIB, "qcow2")
        with device.open("r+b") as file:
            file.write(source.read_bytes())
        assert converted(volumes, device, volumes.directory / "out", "qcow2").reason == "done"
        raw = volumes.directory / "source.raw"
        assert (volumes.directory / "out").read_bytes() == raw.read_bytes()

    def test_source_device_may_be_a_backing_file(self, volumes: Devices) -> None:
        """Files over a volume; qemu-img opens it as a device."""
        device = volumes.add("lv", MIB)
        overlay = volumes.directory / "overlay"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(device), "-F", "raw"]
        subprocess.run([*argv, str(overlay)], check=True)
        outcome = converted(volumes, overlay, volumes.directory / "out", "qcow2")
        assert [member.path for member in outcome.plan.chain] == [str(overlay), str(device)]
        assert (volumes.directory / "out").read_bytes() == b"\xaa" * MIB

    def test_source_device_is_copied_to_a_device_with_other_sectors(self, volumes: Devices) -> None:
        """Of different sectors."""
        source = volumes.add("one", MIB)
        dest = volumes.add("two", SIZE, sector_bytes=4096)
        assert converted(volumes, source, dest).reason == "done"
        assert volumes.bytes_on(dest) == (b"\xaa" * MIB).ljust(SIZE, b"\0")


@contextlib.contextmanager
def failing(dest: destination.Destination) -> Iterator[None]:
    """What a job does while a failure would leave a device undefined."""
    ours, theirs = channel.Channel.pair()
    with ours, theirs, endpoints.undefined_on_failure(dest, context.JobContext(ours, 60.0)):
        yield


class TestOpeningADevice:
    """What is held while a device is written."""

    @contextlib.contextmanager
    def opened(self, volumes: Devices, device: Path) -> Iterator[device_dest.DeviceDest]:
        """Open a device as a destination."""
        grant = rules_of(volumes).convert(grants.request(image(volumes, MIB), device))
        with device_dest.open_dest(grant, WORKER) as dest:
            yield dest

    def test_destination_device_is_opened_exclusively(self, volumes: Devices) -> None:
        """Nobody can mount it meanwhile, nor open it as we do."""
        device = volumes.add("lv", SIZE)
        with self.opened(volumes, device) as dest:
            assert stat.S_ISBLK(os.fstat(dest.fd).st_mode)
            assert fcntl.fcntl(dest.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            assert (dest.size_bytes, dest.group) == (SIZE, DISK_GROUP)
            with pytest.raises(OSError, match="busy"):
                os.open(device, os.O_RDONLY | os.O_EXCL)
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))

    def test_local_conversion_ignores_the_group_of_a_device(self, volumes: Devices) -> None:
        """Qemu-img has our own rights then."""
        device = volumes.add("lv", SIZE)
        os.chmod(device, 0o600)
        grant = rules_of(volumes).convert(grants.request(image(volumes, MIB), device))
        with device_dest.open_dest(grant, None) as dest:
            assert dest.group is None

    def test_device_flush_error_is_reported(self, volumes: Devices) -> None:
        """In the kernel's words; here the range that is zeroed is not the device's."""
        device = volumes.add("lv", SIZE)
        with self.opened(volumes, device) as dest:
            lying = dataclasses.replace(dest, size_bytes=2 * SIZE)
            planned = grants.plan_of(MIB)
            failure = refusals.refusal_of(lambda: lying.flush(planned))
        assert failure is not None
        assert failure.reason == "WRITE_FAILED"

    def test_failed_file_destination_has_no_undefined_content(self, area: Path) -> None:
        """It just never appears."""
        rules = grants.Rules(roots=(grants.files(area),))
        grant = rules.convert(grants.request(area / "a", area / "b"))
        with (
            endpoints.open_dest(grant, whole_job.setup()) as dest,
            pytest.raises(conditions.Stalled) as stalled,
            failing(dest),
        ):
            raise conditions.Stalled(stall_s=1.0)
        assert stalled.value.undefined_device == ""

    def test_failed_device_destination_has_undefined_content(self, volumes: Devices) -> None:
        """Whatever it failed of."""
        device = volumes.add("lv", SIZE)
        with (
            self.opened(volumes, device) as dest,
            pytest.raises(conditions.Stalled) as stalled,
            failing(dest),
        ):
            raise conditions.Stalled(stall_s=1.0)
        assert stalled.value.undefined_device == str(device)

    def test_root_of_devices_without_dev_is_reported_as_missing(self) -> None:
        """A root of devices is resolved from /dev anew by each job."""
        rules = grants.Rules(roots=(grants.devices("/dev/no-such-group"),))
        place = rules.place("/dev/no-such-group/lv")
        reason = refusals.reason_of(lambda: paths.open_source(place, grants.CALLER).__enter__())
        assert reason == "SOURCE_NOT_FOUND"
