"""A result that is written through the page cache, and does not stay there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grants
import pytest
import whole_job
from children import in_child
from harness import processes, waiting
from harness.mounts import Mounts

from convertd_core import messages, values
from convertd_daemon import channel
from convertd_daemon.job.files import write_behind, write_trial
from convertd_daemon.job.qemu import cache_modes
from convertd_daemon.linux import mincore

MIB: Final = 1024 * 1024


@pytest.fixture
def written(area: Path) -> Iterator[int]:
    """An inode without a name, as a result is."""
    descriptor = os.open(area, os.O_TMPFILE | os.O_RDWR, 0o600)
    yield descriptor
    os.close(descriptor)


def resident_bytes(descriptor: int) -> int:
    """How much of a file is in the page cache."""
    size = os.fstat(descriptor).st_size
    return mincore.resident_pages(descriptor, 0, size) * 4096 if size else 0


def flushers() -> list[int]:
    """The children of this process that write behind, and have not ended."""
    return [
        process.pid
        for process in processes.of_session(os.getsid(0))
        if process.parent == os.getpid()
        and process.name == write_behind.NAME
        and not process.is_over
    ]


def test_written_file_leaves_the_page_cache(written: int) -> None:
    """Without any fsync(2); and the data are on the disk, from which they are read again."""
    data = os.urandom(MIB) * 16
    with write_behind.running(written):
        os.pwrite(written, data, 0)
        waiting.until(lambda: resident_bytes(written) == 0, "all of it has left")
    assert os.pread(written, len(data), 0) == data


def test_page_cache_stays_small_while_a_large_file_is_written(written: int) -> None:
    """512 MiB, a piece of 8 MiB whenever less than 64 MiB are in memory: it never comes to more."""
    piece = os.urandom(MIB) * 8
    with write_behind.running(written):
        for number in range(64):
            waiting.until(lambda: resident_bytes(written) < 64 * MIB, "there is room", 60.0)
            os.pwrite(written, piece, number * len(piece))
    os.fsync(written)
    write_behind.drop(written)
    assert resident_bytes(written) == 0


def test_process_that_writes_behind_ends_with_the_block(written: int) -> None:
    """However the block is left."""
    with contextlib.suppress(KeyError), write_behind.running(written):
        waiting.until(flushers, "the process has its name")
        raise KeyError
    assert not flushers()


def test_process_that_writes_behind_ends_with_its_job(written: int) -> None:
    """Nobody else would end it."""

    def be_killed() -> None:
        with write_behind.running(written):
            waiting.until(flushers, "the process has its name")
            os.write(written, b"%d" % flushers()[0])
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError):
        in_child(be_killed)
    pid = int(os.pread(written, 20, 0))
    waiting.until(lambda: not processes.exists(pid), "it has ended")


def test_write_error_is_reported_to_the_jobs_own_fsync(mounts: Mounts) -> None:
    """Though the writes had failed, and were forgotten, long before."""
    pool = mounts.in_memory("tmpfs", "pool", "mode=755,size=40m")
    with Mounts(pool) as thin:
        disk = thin.on_a_loop("ext4", "disk", 1024)
        descriptor = os.open(disk, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            with write_behind.running(descriptor):
                piece = os.urandom(MIB)
                for _ in range(64):
                    os.write(descriptor, piece)
                waiting.until(lambda: resident_bytes(descriptor) == 0, "it has failed")
            with pytest.raises(OSError, match=r"error|space") as caught:
                os.fsync(descriptor)
            assert caught.value.errno in {errno.EIO, errno.ENOSPC}
        finally:
            os.close(descriptor)


class TestWholeJob:
    """With the trial's outcome settled: whatever the disk, the page cache is what gains."""

    @pytest.fixture(autouse=True)
    def buffered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have each trial end in favour of the page cache, and one made for smaller images."""
        monkeypatch.setattr(cache_modes, "GAIN", 0.0)
        for module in (write_trial, write_behind):
            monkeypatch.setattr(module, "LEAST_BYTES", 32 * MIB)

    @pytest.fixture
    def grant(self, area: Path) -> values.ConvertGrant:
        """Leave to convert 64 MiB without a zero, that are on the disk alone."""
        return to_convert(area, 64)

    @pytest.mark.parametrize("image_format", ["raw", "qcow2"])
    def test_conversion_through_the_page_cache_leaves_it_to_others(
        self, area: Path, grant: values.ConvertGrant, image_format: str
    ) -> None:
        """Neither source nor result is in it at the end; and the reply has the trial's figures."""
        outcome = whole_job.run(in_format(grant, image_format))
        choice = outcome.published.dest_cache
        assert choice.mode is values.CacheMode.WRITEBACK
        assert choice.reason.startswith(
            "written back as it goes, and dropped from the page cache: "
        )
        assert "MiB/s" in choice.reason
        for name in ("in", "out"):
            with (area / name).open("rb") as file:
                assert resident_bytes(file.fileno()) <= 12 * MIB
        compare = ["qemu-img", "compare", "-f", "raw", "-F", image_format, str(area / "in")]
        subprocess.run([*compare, str(area / "out")], check=True, capture_output=True)

    def test_page_cache_stays_small_during_a_conversion(self, area: Path) -> None:
        """Seen through a descriptor of the job's: of 320 MiB, half at the most."""
        grant, most = to_convert(area, 320), 0
        with whole_job.started(grant) as (job, line), contextlib.suppress(channel.Closed):
            while True:
                event, _ = line.receive(*messages.FROM_JOB)
                if not isinstance(event, messages.Succeeded | messages.Failed):
                    with contextlib.suppress(OSError):
                        most = max(most, resident_in(area, job.pid))
        assert 0 < most <= 150 * MIB

    @pytest.mark.parametrize("image_format", ["raw", "qcow2"])
    def test_result_is_whole_after_a_power_cut_that_follows_the_reply(
        self, mounts: Mounts, image_format: str
    ) -> None:
        """A copy of the disk at that moment has all of it: what the disk has not, is lost."""
        point = mounts.on_a_loop("ext4", "disk", 256)
        grant = in_format(to_convert(point, 64), image_format)
        choice = whole_job.run(grant).published.dest_cache
        subprocess.run(["cp", point.with_name(".disk.ext4"), point.with_name("cut")], check=True)
        assert choice.mode is values.CacheMode.WRITEBACK
        after = point.with_name("after")
        after.mkdir()
        subprocess.run(["mount", "-o", "loop", point.with_name("cut"), after], check=True)
        try:
            compare = ["qemu-img", "compare", "-f", "raw", "-F", image_format]
            ends = [str(after / "in"), str(after / "out")]
            subprocess.run([*compare, *ends], check=True, capture_output=True)
        finally:
            subprocess.run(["umount", after], check=True)

    @pytest.mark.parametrize("mode", [values.CacheMode.WRITEBACK, values.CacheMode.NONE])
    def test_requested_cache_mode_is_used_without_a_trial(
        self, area: Path, grant: values.ConvertGrant, mode: values.CacheMode
    ) -> None:
        """And what the caller wants in the page cache stays there."""
        request = dataclasses.replace(grant.request, cache_mode=mode)
        outcome = whole_job.run(dataclasses.replace(grant, request=request))
        choice = outcome.published.dest_cache
        assert (choice.mode, choice.reason) == (mode, "asked for")
        with (area / "out").open("rb") as file:
            stays = resident_bytes(file.fileno()) > 32 * MIB
        assert stays is (mode is values.CacheMode.WRITEBACK)

    def test_source_in_the_page_cache_is_converted_without_a_trial(
        self, area: Path, grant: values.ConvertGrant
    ) -> None:
        """It is read more quickly than a disk writes, and would fill the page cache."""
        (area / "in").read_bytes()
        outcome = whole_job.run(grant)
        assert outcome.published.source_cache.mode is values.CacheMode.WRITEBACK
        assert outcome.published.dest_cache.mode is values.CacheMode.NONE
        with (area / "in").open("rb") as file:
            assert resident_bytes(file.fileno()) > 60 * MIB


def to_convert(directory: Path, size_mib: int) -> values.ConvertGrant:
    """Leave to convert a raw image without a zero, that is on the disk alone, to another one."""
    with (directory / "in").open("wb") as file:
        for _ in range(size_mib):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
        write_behind.drop(file.fileno())
    rules = grants.Rules(roots=(grants.files(directory, mounts=True),))
    return rules.convert(grants.request(directory / "in", directory / "out"))


def in_format(grant: values.ConvertGrant, image_format: str) -> values.ConvertGrant:
    """The same, for a result in that format."""
    request = grants.to(grant.request, format=image_format)
    return dataclasses.replace(grant, request=request)


def resident_in(area: Path, pid: int) -> int:
    """How much of a job's unnamed result is in the page cache."""
    directory = f"/proc/{pid}/fd"
    for number in os.listdir(directory):
        leads_to = os.readlink(f"{directory}/{number}")
        if leads_to.startswith(str(area)) and leads_to.endswith("(deleted)"):
            descriptor = os.open(f"{directory}/{number}", os.O_RDONLY)
            try:
                return resident_bytes(descriptor)
            finally:
                os.close(descriptor)
    return 0


class TestTrial:
    """What a disk takes past the page cache, and through it."""

    def test_trial_leaves_the_file_empty(self, written: int) -> None:
        """No block of it ends up in the result."""
        rates = write_trial.write_rates(written)
        assert rates is not None
        assert rates.direct_bytes_per_s > 0
        assert rates.buffered_bytes_per_s > 0
        status = os.fstat(written)
        assert (status.st_size, status.st_blocks) == (0, 0)

    @pytest.mark.parametrize(("gain", "rounds"), [(0.0, write_trial.ROUNDS), (math.inf, 1)])
    def test_trial_ends_with_the_first_round_that_the_page_cache_loses(
        self, written: int, monkeypatch: pytest.MonkeyPatch, gain: float, rounds: int
    ) -> None:
        """Mostly the first one: it is all that a conversion on such a disk pays."""
        sizes: list[int] = []
        monkeypatch.setattr(cache_modes, "GAIN", gain)
        monkeypatch.setattr(os, "ftruncate", lambda _, size: sizes.append(size))
        write_trial.write_rates(written)
        assert len(sizes) == rounds + 1  # the last one empties the file

    def test_trial_on_a_file_with_data_is_an_error(self, written: int) -> None:
        """It would lose what it holds."""
        os.write(written, b"data")
        with pytest.raises(ValueError, match="holds data"):
            write_trial.write_rates(written)
        assert os.pread(written, 9, 0) == b"data"

    def test_trial_without_space_has_no_outcome(self, mounts: Mounts) -> None:
        """The conversion will tell what is wrong."""
        point = mounts.in_memory("tmpfs", "full", "mode=755,size=64k")
        descriptor = os.open(point / "file", os.O_CREAT | os.O_RDWR, 0o600)
        assert write_trial.write_rates(descriptor) is None
        assert os.fstat(descriptor).st_size == 0
        os.close(descriptor)
