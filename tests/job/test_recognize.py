"""An image is read as what it is: by a driver that the policy allows, whole, or not at all."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import children
import encrypting
import grants
import pytest
import whole_job
from hostile import containers, forged
from hostile.containers import MIB, SECTOR, Vhd

from convertd_core import conditions, values

FEW: Final = ("raw", "qcow2")
"""What a policy allows unless it says more."""

DISK: Final = random.Random(1).randbytes(MIB)  # noqa: S311 - the same in each run


def converted(
    source: Path, stated: str = "", formats: tuple[str, ...] = tuple(values.FORMATS)
) -> whole_job.JobEvents:
    """Convert an image to `out` beside it, by a whole job."""
    rules = grants.Rules(roots=(grants.files(source.parent),), read_formats=formats)
    return whole_job.run(rules.convert(grants.request(source, source.parent / "out", stated)))


def inspected(
    source: Path, stated: str = "", formats: tuple[str, ...] = tuple(values.FORMATS)
) -> whole_job.JobEvents:
    """Look at an image, by a whole job."""
    rules = grants.Rules(roots=(grants.files(source.parent),), read_formats=formats)
    return whole_job.run(rules.inspect(values.Source(path=str(source), format=stated)))


def failure_of(outcome: whole_job.JobEvents) -> conditions.Failure:
    """What it failed of."""
    assert outcome.failure is not None
    return outcome.failure


def overlay(path: Path, backing_format: str) -> Path:
    """A qcow2 that stands on `in` beside it."""
    data = forged.Qcow2(size=10 * MIB, backing="in", backing_format=backing_format).data()
    path.write_bytes(data)
    return path


def bochs() -> bytes:
    """An image that the driver refuses to open, if it ever gets to see it."""
    names = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0")
    sizes = struct.pack("<IIIIIIQ", 0x20000, 512, 2**32 - 1, 1, 512, 0, 512)
    return (names + b"Growing".ljust(16, b"\0") + sizes).ljust(64 * 1024, b"\0")


def cloop() -> bytes:
    """The same of another driver."""
    script = (
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
    )
    return (script.ljust(128, b"\0") + struct.pack(">II", 511, 1)).ljust(64 * 1024, b"\0")


BROKEN: Final[dict[str, bytes]] = {
    "bochs": bochs(),
    "cloop": cloop(),
    "qcow": b"QFI\xfb\0\0\0\1".ljust(SECTOR, b"\xff"),
    "vmdk": b"KDMV".ljust(SECTOR, b"\xff"),
    "vdi": bytes(64) + b"\x7f\x10\xda\xbe".ljust(SECTOR, b"\xff"),
    "vpc": b"conectix".ljust(SECTOR, b"\xff"),
    "vhdx": b"vhdxfile".ljust(SECTOR, b"\xff"),
    "qed": b"QED\0".ljust(SECTOR, b"\xff"),
    "parallels": b"WithouFreSpacExt\2\0\0\0".ljust(SECTOR, b"\xff"),
    "luks": b"LUKS\xba\xbe\0\1".ljust(SECTOR, b"\xff"),
}
"""What each driver fails to open: so that its failure shows that it was asked."""


def complete_vhd_disk() -> bytes:
    """A disk that has something in its last sector."""
    return DISK.ljust(10 * MIB - SECTOR, b"\0") + b"\xee" * SECTOR


MISTAKEN: Final[dict[str, tuple[str, bytes, bytes]]] = {
    "differencing vhd": (
        "",
        Vhd(disk_type=containers.DIFFERENCING, parent="parent.vhd").sparse({0: DISK}),
        b"the parent's data",
    ),
    "vhd of an unknown type": ("", Vhd(disk_type=6).sparse({0: DISK}), b"nothing"),
    "segment of a dmg": ("dmg", containers.dmg(DISK, segments=2), b"both segments"),
    "vhd of virtualbox": ("vpc", Vhd().fixed(complete_vhd_disk()), complete_vhd_disk()),
    "fixed vhd": ("", Vhd(size=MIB).fixed(DISK), DISK),
    "dmg": ("", containers.dmg(DISK), DISK),
    "cd with a header": ("", containers.with_header(containers.cd()), containers.cd()),
    "disk with a header": ("", containers.with_header(containers.gpt()), containers.gpt()),
    **{name: ("", data, DISK) for name, data in containers.packed(DISK).items()},
}
"""Images by name: the format that is stated, the file, and what is really on the disk."""


@pytest.mark.parametrize("name", MISTAKEN)
def test_control_bare_qemu_img_misreads_the_image_of(area: Path, name: str) -> None:
    """With status 0."""
    stated, data, disk = MISTAKEN[name]
    (area / "in").write_bytes(data)
    argv = ["qemu-img", "convert", "-O", "raw", *(("-f", stated) if stated else ())]
    subprocess.run([*argv, str(area / "in"), str(area / "out")], check=True, capture_output=True)
    assert (area / "out").read_bytes() != disk


class TestOnlyAllowedDrivers:
    """What the policy does not allow is not even opened."""

    @pytest.mark.parametrize("image_format", BROKEN)
    @pytest.mark.parametrize("act", [converted, inspected])
    def test_image_of_a_format_not_allowed_is_not_opened(
        self, area: Path, image_format: str, act: Callable[..., whole_job.JobEvents]
    ) -> None:
        """Its format is told, not that it could not be opened."""
        (area / "in").write_bytes(BROKEN[image_format])
        failure = failure_of(act(area / "in", formats=FEW))
        assert failure.reason == "FORMAT_NOT_ALLOWED"
        assert dict(failure.values)["format"] == image_format

    @pytest.mark.parametrize("image_format", BROKEN)
    @pytest.mark.parametrize("stated", [True, False])
    def test_backing_file_of_a_format_not_allowed_is_not_opened(
        self, area: Path, image_format: str, *, stated: bool
    ) -> None:
        """Whether or not the overlay says what it stands on."""
        (area / "in").write_bytes(BROKEN[image_format])
        top = overlay(area / "top", image_format if stated else "")
        failure = failure_of(converted(top, "qcow2", FEW))
        assert failure.reason == "FORMAT_NOT_ALLOWED"
        assert dict(failure.values)["format"] == image_format

    @pytest.mark.parametrize("named", ["nbd", "vvfat", "blkdebug", "null-co", "no-such\x1b"])
    def test_backing_format_name_unknown_to_convertd_is_refused(
        self, area: Path, named: str
    ) -> None:
        """Qemu has more drivers than formats."""
        (area / "in").write_bytes(DISK)
        said = converted(overlay(area / "top", named), "qcow2")
        assert failure_of(said).reason == "FORMAT_NOT_ALLOWED"

    def test_broken_image_of_an_allowed_format_is_opened_and_refused(self, area: Path) -> None:
        """And says what is wrong."""
        (area / "in").write_bytes(BROKEN["vmdk"])
        assert converted(area / "in").reason == "IMAGE_REFUSED"

    def test_unrecognized_content_is_raw(self, area: Path) -> None:
        """And refused as that where raw is not allowed."""
        (area / "in").write_bytes(DISK)
        failure = failure_of(converted(area / "in", formats=("qcow2",)))
        assert (failure.reason, dict(failure.values)["format"]) == ("FORMAT_NOT_ALLOWED", "raw")
        assert converted(area / "in").reason == "done"


ANY_DRIVER: Final = "json:{'driver':'bochs','file':{'driver':'file','filename':'/proc/self/fd/6'}}"

NAMING: Final = {
    "descriptor": ("vmdk", forged.flat_vmdk(ANY_DRIVER), "IMAGE_REFUSED"),
    "descriptor in a sparse one": (
        "vmdk",
        forged.sparse_vmdk_with(forged.flat_vmdk(ANY_DRIVER)),
        "IMAGE_REFUSED",
    ),
    "without a comment": ("vmdk", b"any\n" + forged.flat_vmdk(ANY_DRIVER), "IMAGE_REFUSED"),
    "whose type comes late": (
        "vmdk",
        b"any\n" * 2000 + forged.flat_vmdk(ANY_DRIVER),
        "FORMAT_MISMATCH",
    ),
    "data file": ("qcow2", forged.Qcow2(data_file=ANY_DRIVER).data(), "IMAGE_REFUSED"),
    "none": ("qcow2", forged.Qcow2().data(), "done"),
}
"""Images that name another file: their format, what is in them, and how that ends."""


class TestExternalData:
    """What says that its data is in another file is not half a disk, it is none."""

    @pytest.mark.parametrize("disk_type", [0, 1, 2, 4, 5, 6, 7, 2**32 - 1])
    @pytest.mark.parametrize("stated", ["vpc", ""])
    def test_vhd_of_any_type_but_dynamic_is_refused(
        self, area: Path, disk_type: int, stated: str
    ) -> None:
        """A differencing one has its parent's data in the parent."""
        vhd = Vhd(disk_type=disk_type, parent="parent.vhd")
        (area / "in").write_bytes(vhd.sparse({0: DISK}))
        failure = failure_of(converted(area / "in", stated))
        assert failure.reason == "IMAGE_REFUSED"
        assert failure_of(inspected(area / "in", stated)).reason == "IMAGE_REFUSED"
        assert ("differencing" in failure.message) is (disk_type == containers.DIFFERENCING)
        assert not (area / "out").exists()

    def test_differencing_vhd_under_an_overlay_is_refused(self, area: Path) -> None:
        """As the source itself would be."""
        (area / "in").write_bytes(Vhd(disk_type=containers.DIFFERENCING).sparse({0: DISK}))
        assert converted(overlay(area / "top", "vpc"), "qcow2").reason == "IMAGE_REFUSED"

    def test_vhd_with_two_different_footers_is_refused(self, area: Path) -> None:
        """A guest wrote the first into its own disk, or somebody the last."""
        size = 10 * MIB
        dynamic = Vhd(disk_type=containers.DYNAMIC).sparse({0: DISK})
        for data in (
            Vhd(size=size).fixed(dynamic[:-SECTOR].ljust(size, b"\0")),
            dynamic[:-SECTOR] + Vhd(disk_type=containers.DIFFERENCING).footer(),
        ):
            (area / "in").write_bytes(data)
            assert converted(area / "in", "vpc").reason == "IMAGE_REFUSED"

    def test_dynamic_vhd_without_its_last_footer_is_converted(self, area: Path) -> None:
        """The first is there for that."""
        data = Vhd(disk_type=containers.DYNAMIC).sparse({0: DISK})
        (area / "in").write_bytes(data[:-SECTOR])
        assert converted(area / "in", "vpc").reason == "done"
        assert (area / "out").read_bytes() == DISK.ljust(10 * MIB, b"\0")

    @pytest.mark.parametrize("image_type", [0, 3, 4, 5])
    def test_vdi_that_is_neither_dynamic_nor_fixed_is_refused(
        self, area: Path, image_type: int
    ) -> None:
        """3 is for undoing what is in another, 4 differs from another."""
        assert converted(_patched(area / "in", "vdi", 76, struct.pack("<I", 1))).reason == "done"
        (area / "out").unlink()
        source = _patched(area / "in", "vdi", 76, struct.pack("<I", image_type))
        assert converted(source).reason == "IMAGE_REFUSED"

    def test_vhdx_with_a_parent_is_refused(self, area: Path) -> None:
        """By qemu itself."""
        argv = ["qemu-img", "create", "-q", "-f", "vhdx", str(area / "in"), "8M"]
        subprocess.run(argv, check=True)
        data = bytearray((area / "in").read_bytes())
        table = data.index(b"metadata")
        # Source: MS-VHDX 2.6.2.1, File Parameters.
        item = data.index(bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b"))
        (offset,) = struct.unpack_from("<I", data, item + 16)
        data[table + offset + 4] |= 2
        (area / "in").write_bytes(data)
        assert converted(area / "in").reason == "IMAGE_REFUSED"

    def test_vmdk_with_an_unnamed_parent_is_refused(self, area: Path) -> None:
        """It says that it has one, by its id."""
        (area / "parent").write_bytes(forged.overlay(area / "x", "vmdk", _created(area), "vmdk"))
        data = (area / "parent").read_bytes()
        (area / "in").write_bytes(data.replace(b"parentFileNameHint", b"parentFileNameXint"))
        assert failure_of(converted(area / "in")).message.endswith("its data is in another file")

    def test_qcow2_with_an_unnamed_data_file_is_refused(self, area: Path) -> None:
        """It says that it has one, by a bit."""
        data = forged.Qcow2(data_file="nowhere").data()
        unnamed = data.replace(struct.pack(">I", forged.DATA_FILE), struct.pack(">I", 0x0BADCAFE))
        (area / "in").write_bytes(unnamed)
        assert failure_of(inspected(area / "in")).message.endswith("its data is in another file")

    def test_detached_luks_header_is_refused(self, area: Path) -> None:
        """It would be a disk of no bytes."""
        secret = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=1"]
        encrypting.qemu_img("create", "-q", "-f", "luks", *secret, area / "in", "1M")
        os.truncate(area / "in", (area / "in").stat().st_size - MIB)
        assert failure_of(inspected(area / "in")).message.endswith("its data is in another file")

    def test_single_segment_of_an_apple_disk_image_is_refused(self, area: Path) -> None:
        """The others are files of their own."""
        (area / "in").write_bytes(containers.dmg(DISK, segments=2))
        assert converted(area / "in", "dmg").reason == "IMAGE_REFUSED"
        (area / "in").write_bytes(containers.dmg(DISK))
        assert converted(area / "in", "dmg").reason == "done"
        assert (area / "out").read_bytes() == DISK

    @pytest.mark.parametrize("more", [1, 100, 511])
    def test_dmg_segment_is_recognized_wherever_qemu_recognizes_it(
        self, area: Path, more: int
    ) -> None:
        """Its trailer may have something behind it."""
        whole = containers.dmg(DISK, segments=2)
        (area / "in").write_bytes(whole + b"\n" * more)
        assert converted(area / "in").reason == "AMBIGUOUS_FORMAT"
        assert converted(area / "in", "dmg").reason == "IMAGE_REFUSED"

    @pytest.mark.parametrize("kind", NAMING)
    def test_qemu_img_is_not_run_on_an_image_that_names_other_files(
        self, area: Path, kind: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Older versions take a name for any driver at all: they never see it."""
        image_format, data, reason = NAMING[kind]
        (area / "in").write_bytes(data)
        with children.logging_to_stderr(logging.DEBUG):
            found = [act(area / "in", image_format) for act in (inspected, converted)]
        assert [outcome.reason for outcome in found] == [reason, reason]
        assert ("run command=" in capfd.readouterr().err) == (reason == "done")


CREATORS: Final = (b"vbox", b"vpc ", b"vs  ", b"qemu", b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")


class TestVhdSizes:
    """A VHD has two: cylinders, heads and sectors, which are rounded, and its current size."""

    @pytest.mark.parametrize("creator", CREATORS)
    @pytest.mark.parametrize("is_fixed", [True, False])
    def test_vhd_is_converted_in_full_whatever_program_created_it(
        self, area: Path, creator: bytes, *, is_fixed: bool
    ) -> None:
        """The last sectors too, where the backup of a partition table lies; and it is told."""
        disk = DISK.ljust(10 * MIB - SECTOR, b"\0") + b"\xee" * SECTOR
        kind = containers.FIXED if is_fixed else containers.DYNAMIC
        vhd = Vhd(creator=creator, disk_type=kind)
        pieces = {n: disk[n * 2 * MIB : (n + 1) * 2 * MIB] for n in range(5)}
        (area / "in").write_bytes(vhd.fixed(disk) if is_fixed else vhd.sparse(pieces))
        outcome = converted(area / "in", "vpc")
        assert (area / "out").read_bytes() == disk
        warnings = outcome.published.warnings
        assert [warning.reason for warning in warnings] == ["VHD_SIZES_DIFFER"]
        assert f"{301 * 4 * 17 * SECTOR} bytes" in warnings[0].message
        assert f"all {10 * MIB} are read" in warnings[0].message
        found = inspected(area / "in", "vpc").inspected
        assert found.virtual_size_bytes == 10 * MIB
        assert found.warnings == warnings

    def test_vhd_under_an_overlay_is_read_in_full(self, area: Path) -> None:
        """And told of by its own path."""
        disk = DISK.ljust(10 * MIB - SECTOR, b"\0") + b"\xee" * SECTOR
        (area / "in").write_bytes(Vhd().fixed(disk))
        outcome = converted(overlay(area / "top", "vpc"), "qcow2")
        assert (area / "out").read_bytes() == disk
        (warning,) = outcome.published.warnings
        assert warning.message.startswith(f"{area}/in: ")

    def test_verification_compares_the_full_vhd(self, area: Path) -> None:
        """Not what the geometry comes to."""
        disk = DISK.ljust(10 * MIB - SECTOR, b"\0") + b"\xee" * SECTOR
        (area / "in").write_bytes(Vhd().fixed(disk))
        rules = grants.Rules(roots=(grants.files(area),))
        request = grants.request(area / "in", area / "out", "vpc", "vpc")
        outcome = whole_job.run(rules.convert(dataclasses.replace(request, verify=True)))
        assert outcome.published.verified
        assert converted_back(area / "out") == disk

    def test_vhd_with_matching_sizes_has_no_warning(self, area: Path) -> None:
        """Nor a geometry that is at its end: larger disks have no other."""
        disk = DISK[: 17 * 4 * 4 * SECTOR]
        vhd = Vhd(size=len(disk), geometry=(4, 4, 17))
        (area / "in").write_bytes(vhd.fixed(disk))
        assert converted(area / "in", "vpc").published.warnings == ()
        (area / "out").unlink()
        large = Vhd(size=128 << 30, geometry=(65535, 16, 255), disk_type=containers.DYNAMIC)
        (area / "in").write_bytes(large.sparse({}))
        assert inspected(area / "in", "vpc").inspected.warnings == ()

    def test_data_beyond_the_size_of_a_fixed_vhd_is_reported(self, area: Path) -> None:
        """It is no part of the disk, and whoever put it there may think so."""
        (area / "in").write_bytes(Vhd(size=MIB, geometry=(30, 4, 17)).fixed(DISK + DISK))
        (warning,) = converted(area / "in", "vpc").published.warnings
        assert warning.reason == "VHD_SIZES_DIFFER"
        assert warning.message.endswith(f"the last {MIB} are not read")
        assert (area / "out").read_bytes() == DISK

    def test_fixed_vhd_with_a_footer_larger_than_its_file_is_refused(self, area: Path) -> None:
        """Its footer would be read as if it were on the disk."""
        (area / "in").write_bytes(Vhd(size=2 * MIB).fixed(DISK))
        assert converted(area / "in", "vpc").reason == "IMAGE_REFUSED"

    @pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
    def test_vhd_written_by_convertd_is_read_with_its_exact_size(
        self, area: Path, subformat: str
    ) -> None:
        """Of a size that no geometry has."""
        disk = DISK + os.urandom(3 * SECTOR)
        (area / "in").write_bytes(disk)
        options = (values.CreationOption(name="subformat", value=subformat),)
        rules = grants.Rules(roots=(grants.files(area),))
        request = grants.to(
            grants.request(area / "in", area / "mid", "raw", "vpc"), options=options
        )
        assert whole_job.run(rules.convert(request)).reason == "done"
        assert converted(area / "mid", "vpc").reason == "done"
        assert (area / "out").read_bytes() == disk


def converted_back(source: Path) -> bytes:
    """What a VHD has on it."""
    out = source.with_name("back")
    rules = grants.Rules(roots=(grants.files(source.parent),))
    assert whole_job.run(rules.convert(grants.request(source, out, "vpc"))).reason == "done"
    return out.read_bytes()


class TestContainers:
    """What is found to be raw and looks like something else."""

    @pytest.mark.parametrize("command", containers.packed(b""))
    def test_compressed_disk_is_refused_with_the_command_to_unpack_it(
        self, area: Path, command: str
    ) -> None:
        """Which then gives the disk."""
        (area / "in").write_bytes(containers.packed(DISK)[command])
        failure = failure_of(converted(area / "in"))
        assert failure.reason == "AMBIGUOUS_FORMAT"
        assert failure_of(inspected(area / "in")) == failure
        assert not (area / "out").exists()
        remedy = dict(failure.values)["remedy"]
        told = remedy.partition("(")[2].partition(")")[0]
        assert told.split()[0] == command
        subprocess.run(
            ["sh", "-c", told.replace("IMAGE", str(area / "in"))],
            cwd=area,
            check=True,
            capture_output=True,
        )
        assert (area / "DISK").read_bytes() == DISK
        assert remedy.endswith("state its format: raw")
        assert converted(area / "in", "raw").reason == "done"
        assert (area / "out").read_bytes() == _full_sectors((area / "in").read_bytes())

    def test_ova_archive_is_refused_by_name(self, area: Path) -> None:
        """The disks are in it."""
        (area / "in").write_bytes(containers.tar("machine.ovf", b"<Envelope/>"))
        assert dict(failure_of(converted(area / "in")).values)["found"].startswith("an OVA")

    @pytest.mark.parametrize(
        ("stated", "data"),
        [
            pytest.param("dmg", containers.dmg(DISK), id="dmg"),
            pytest.param("vpc", Vhd(size=MIB).fixed(DISK), id="vhd"),
            pytest.param("vpc", Vhd(size=MIB).fixed(DISK)[:-1], id="old-vhd"),
        ],
    )
    def test_image_recognized_by_its_footer_needs_a_stated_format(
        self, area: Path, stated: str, data: bytes
    ) -> None:
        """For qemu's probe looks at the beginning only."""
        (area / "in").write_bytes(data)
        failure = failure_of(converted(area / "in"))
        assert failure.reason == "AMBIGUOUS_FORMAT"
        assert f"state its format: {stated}" in dict(failure.values)["remedy"]
        assert converted(area / "in", stated).reason == "done"
        assert (area / "out").read_bytes() == DISK
        (area / "out").unlink()
        assert converted(area / "in", "raw").reason == "done"

    def test_fixed_vhd_written_by_convertd_is_recognized(self, area: Path) -> None:
        """As anybody's."""
        (area / "in").write_bytes(DISK)
        options = (values.CreationOption(name="subformat", value="fixed"),)
        request = grants.to(
            grants.request(area / "in", area / "mid", "raw", "vpc"), options=options
        )
        rules = grants.Rules(roots=(grants.files(area),))
        assert whole_job.run(rules.convert(request)).reason == "done"
        assert converted(area / "mid").reason == "AMBIGUOUS_FORMAT"

    def test_base_with_the_signature_of_another_format_is_not_read_as_raw(self, area: Path) -> None:
        """Where its overlay does not say that it is."""
        (area / "in").write_bytes(containers.packed(DISK)["gzip"])
        failure = failure_of(converted(overlay(area / "top", ""), "qcow2"))
        assert failure.reason == "BACKING_REFUSED"
        assert "looks like gzip data" in failure.message
        assert converted(overlay(area / "top", "raw"), "qcow2").reason == "done"


class TestAmbiguousImages:
    """A header of a format, and a whole disk or CD all the same."""

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            pytest.param(containers.cd(), "a CD", id="cd"),
            pytest.param(containers.gpt(), "GPT", id="gpt"),
            pytest.param(containers.gpt(4096), "GPT", id="gpt-4096"),
            pytest.param(containers.gpt()[:SECTOR].ljust(MIB, b"\1"), "boot sector", id="mbr"),
        ],
    )
    def test_disk_with_an_image_header_needs_a_stated_format(
        self, area: Path, data: bytes, words: str
    ) -> None:
        """A qcow2 to qemu, a disk to whoever made it."""
        (area / "in").write_bytes(containers.with_header(data))
        for act in (converted, inspected):
            failure = failure_of(act(area / "in"))
            assert failure.reason == "AMBIGUOUS_FORMAT"
            assert words in dict(failure.values)["found"]
        assert converted(area / "in", "qcow2").reason == "done"
        assert (area / "out").stat().st_size == forged.SIZE
        (area / "out").unlink()
        assert converted(area / "in", "raw").reason == "done"

    @pytest.mark.parametrize(
        ("image_format", "mib", "options"),
        [
            pytest.param("vpc", 514, "force_size=on", id="least vhd"),
            pytest.param("vpc", 768, "force_size=on", id="largest vhd"),
            pytest.param("vdi", 700, "static=off", id="vdi"),
            pytest.param("qcow2", 6, "cluster_size=512", id="qcow2"),
        ],
    )
    def test_gpt_disk_inside_an_image_is_not_a_second_format(
        self, area: Path, image_format: str, mib: int, options: str
    ) -> None:
        """Where its table comes to lie at the place that it has on a disk of larger sectors."""
        (area / "disk").write_bytes(containers.gpt(size=mib * MIB))
        os.truncate(area / "disk", mib * MIB)
        argv = ["qemu-img", "convert", "-f", "raw", "-O", image_format, "-o", options]
        subprocess.run([*argv, str(area / "disk"), str(area / "in")], check=True)
        assert (area / "in").read_bytes()[4096:4104] == b"EFI PART"
        assert converted(area / "in").reason == "done"

    def test_disk_with_an_image_header_inside_a_fixed_vhd_is_refused(self, area: Path) -> None:
        """Its guest wrote it."""
        disk = containers.with_header(DISK)
        (area / "in").write_bytes(Vhd(size=len(disk)).fixed(disk))
        assert "fixed VHD" in dict(failure_of(converted(area / "in")).values)["found"]


class TestRawDisks:
    """None is refused that is a disk."""

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"x", id="a-byte"),
            pytest.param(bytes(MIB), id="zeroes"),
            pytest.param(containers.cd(), id="cd"),
            pytest.param(containers.cd(containers.gpt()[:1024]), id="hybrid-cd"),
            pytest.param(containers.gpt(), id="gpt"),
            pytest.param(containers.gpt(4096), id="gpt-4096"),
            pytest.param(b"\xeb\x63\x90".ljust(510, b"\x90") + b"\x55\xaa" + DISK, id="grub"),
            pytest.param(b"\xeb\x3c\x90mkfs.fat".ljust(510, b"\0") + b"\x55\xaa" + DISK, id="fat"),
            pytest.param(b"hsqs".ljust(MIB, b"\1"), id="squashfs"),
            pytest.param(b"LUKS\xba\xbe\0\2".ljust(MIB, b"\1"), id="luks2"),
            pytest.param(bytes(SECTOR) + b"LABELONE".ljust(MIB, b"\1"), id="lvm"),
        ],
    )
    def test_partitioned_disk_is_recognized_as_raw(self, area: Path, data: bytes) -> None:
        """Whatever is on it. Its size is rounded up to sectors, as qemu does."""
        (area / "in").write_bytes(data)
        outcome = converted(area / "in")
        assert outcome.reason == "done", outcome.failure
        assert (area / "out").read_bytes() == _full_sectors(data)

    @pytest.mark.parametrize("command", ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"])
    def test_file_system_image_is_recognized_as_raw(self, area: Path, command: str) -> None:
        """By its own program."""
        with (area / "in").open("wb") as file:
            file.truncate(320 * MIB)
        subprocess.run([command, "-q", str(area / "in")], check=True, capture_output=True)
        assert converted(area / "in").reason == "done"
        subprocess.run(["cmp", str(area / "in"), str(area / "out")], check=True)


def _full_sectors(data: bytes) -> bytes:
    """A disk as qemu has it."""
    return data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0")


def _created(area: Path) -> Path:
    argv = ["qemu-img", "create", "-q", "-f", "vmdk", str(area / "base"), "4M"]
    subprocess.run(argv, check=True)
    return area / "base"


def _patched(path: Path, image_format: str, offset: int, data: bytes) -> Path:
    """A new image with a few bytes of its header replaced."""
    argv = ["qemu-img", "create", "-q", "-f", image_format, str(path), "4M"]
    subprocess.run(argv, check=True)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)
    return path
