"""A source to which somebody writes while it is converted: nothing is published, whatever it is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grants
import loop_devices
import pytest
import whole_job
from harness.callers import ALICE, PYTHON
from harness.mounts import Mounts

from convertd_core import conditions, messages, values
from convertd_daemon import channel
from convertd_daemon.job.files import opened_source, paths, source_change

MIB: Final = 1024 * 1024
SIZE: Final = 4 * MIB
"""At 1 MiB/s, which is the least, more than two seconds."""

WRITES: Final = {
    "truncated": "os.truncate(path, size - 4096)",
    "grown": "os.truncate(path, size + 4096)",
    "rewritten": "os.pwrite(os.open(path, os.O_WRONLY), bytes(4096), size - 65536)",
    "rewritten by mmap": (
        "mmap.mmap(os.open(path, os.O_RDWR), 0)[size - 65536 : size - 65532] = b'torn'"
    ),
}
"""What the owner of a file may do to it, as Python."""

AGAIN_AND_AGAIN: Final = """
file = os.open(path, os.O_WRONLY)
for _ in range(300):
    os.pwrite(file, os.urandom(4096), size - 65536)
    time.sleep(0.02)
"""

TOUCHES: Final = {
    "chmod": "os.chmod(path, 0o664)",
    "link": "os.link(path, path + '.link'); os.unlink(path + '.link')",
    "read": "open(path, 'rb').read()",
}
"""What changes nothing that is in it."""

SMALL: Final = ("-I", "128")
"""Inodes that have no room for parts of a second."""

FORMATS: Final = {
    "raw": (),
    "qcow2": (),
    "vmdk": (),
    "vdi": (),
    "vhdx": (),
    "vpc": ("-o", "force_size=on"),
    "qed": (),
    "parallels": (),
}


def made(path: Path, image_format: str, *options: str) -> Path:
    """An image of noise, the caller's own."""
    raw = path.with_suffix(".data")
    raw.write_bytes(os.urandom(SIZE))
    argv = ["qemu-img", "convert", "-f", "raw", "-O", image_format, *options]
    subprocess.run([*argv, str(raw), str(path)], check=True)
    raw.unlink()
    os.chown(path, ALICE.uid, ALICE.gid)
    return path


def overlay(path: Path, base: Path) -> Path:
    """An image that stands on another one, and has something of its own."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(path)]
    subprocess.run(argv, check=True)
    argv = ["qemu-io", "-c", "write -P 1 0 1M", str(path)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    os.chown(path, ALICE.uid, ALICE.gid)
    return path


def by_alice(what: str, path: Path) -> None:
    """Have the owner do something to a file."""
    script = f"import mmap, os, sys, time\npath = sys.argv[1]\nsize = os.stat(path).st_size\n{what}"
    done = ALICE.run([PYTHON, "-I", "-c", script, str(path)])
    assert done.status == 0, done.err


def converted_while(
    what: str, changed: Path, source: Path, image_format: str, **asked: object
) -> whole_job.JobEvents:
    """Convert slowly to `out`, and have a file changed when a part of it has been read."""
    request = grants.request(source, source.parent / "out", image_format)
    request = dataclasses.replace(request, **asked)  # type: ignore[arg-type]
    return run_while(what, changed, request, grants.files(source.parent))


def run_while(
    what: str, changed: Path, request: values.ConvertRequest, *roots: values.Root
) -> whole_job.JobEvents:
    """Do what is asked, slowly, and have a file changed as soon as it is being read."""
    grant = grants.Rules(roots=roots).convert(grants.slowly(request))
    events: list[object] = []
    phases: list[values.Phase] = []
    with whole_job.started(grant) as (_, job_channel), contextlib.suppress(channel.Closed):
        while True:
            event, _ = job_channel.receive(*messages.FROM_JOB)
            events.append(event)
            if isinstance(event, messages.Progressed):
                phase = event.progress.phase
                if phase is values.Phase.CONVERTING and phase not in phases:
                    by_alice(what, changed)
                phases.append(phase)
    return whole_job.JobEvents(events=tuple(events))


@pytest.fixture
def own_area(area: Path) -> Path:
    """A directory of the caller's."""
    os.chown(area, ALICE.uid, ALICE.gid)
    return area


def check_refused(outcome: whole_job.JobEvents, path: Path) -> None:
    """See that it was told of the file, and that nothing was published."""
    assert outcome.reason == "SOURCE_CHANGED", outcome.failure
    assert outcome.failure is not None
    assert dict(outcome.failure.values)["path"] == str(path)
    assert not (path.parent / "out").exists()


class TestChangedFiles:
    """Regular files, of another uid than the daemon's and qemu-img's."""

    @pytest.mark.parametrize("write", WRITES)
    def test_raw_source_written_during_the_job_is_not_published(
        self, own_area: Path, write: str
    ) -> None:
        """The result would be old in one place, and new in another."""
        source = made(own_area / "in", "raw")
        check_refused(converted_while(WRITES[write], source, source, "raw"), source)

    @pytest.mark.parametrize("image_format", [name for name in FORMATS if name != "raw"])
    def test_source_of_any_format_rewritten_during_the_job_is_not_published(
        self, own_area: Path, image_format: str
    ) -> None:
        """In the last of its data, which had not been read."""
        source = made(own_area / "in", image_format, *FORMATS[image_format])
        said = converted_while(WRITES["rewritten"], source, source, image_format)
        check_refused(said, source)

    def test_qcow2_truncated_during_the_job_is_reported_as_changed(self, own_area: Path) -> None:
        """Not as one whose data is missing: it was all there."""
        source = made(own_area / "in", "qcow2")
        what = "os.truncate(path, size // 2)"
        check_refused(converted_while(what, source, source, "qcow2"), source)

    def test_source_changed_before_its_verification_is_reported_as_changed(
        self, own_area: Path
    ) -> None:
        """The result differs from the source, and this is why."""
        source = made(own_area / "in", "raw")
        said = converted_while(WRITES["rewritten"], source, source, "raw", verify=True)
        check_refused(said, source)

    def test_rewritten_backing_file_is_reported_as_changed(self, own_area: Path) -> None:
        """What the source stands on is part of what is converted."""
        base = made(own_area / "base", "raw")
        source = overlay(own_area / "in", base)
        check_refused(converted_while(AGAIN_AND_AGAIN, base, source, "qcow2"), base)

    @pytest.mark.parametrize("touch", TOUCHES)
    def test_unchanged_source_is_published_despite_metadata_changes(
        self, own_area: Path, touch: str
    ) -> None:
        """Mode, links and reads leave the contents alone."""
        source = made(own_area / "in", "raw")
        assert converted_while(TOUCHES[touch], source, source, "raw").reason == "done"
        assert (own_area / "out").read_bytes() == source.read_bytes()

    def test_touched_backing_file_does_not_fail_the_job(self, own_area: Path) -> None:
        """Nova does it to an image in its cache, each time an instance is made of it."""
        base = made(own_area / "base", "raw")
        source = overlay(own_area / "in", base)
        assert converted_while("os.utime(path)", base, source, "qcow2").failure is None
        compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*compare, str(source), str(own_area / "out")], check=True)

    def test_device_written_from_a_changed_source_has_undefined_content(
        self, own_area: Path
    ) -> None:
        """What was written there is neither the old image nor the new one."""
        with loop_devices.made(own_area) as devices:
            device = devices.add("volume", SIZE)
            source = made(own_area / "in", "raw")
            roots = (grants.files(own_area), grants.devices(device.parent))
            request = grants.request(source, device)
            outcome = run_while(WRITES["rewritten"], source, request, *roots)
        assert outcome.reason == "SOURCE_CHANGED", outcome.failure
        assert outcome.failure is not None
        assert dict(outcome.failure.values)["device_content"] == "undefined"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[opened_source.Source]:
    """A file, opened as a source is."""
    place = grants.Rules(roots=(grants.files(path.parent),)).place(str(path))
    with paths.open_source(place, grants.CALLER) as source:
        yield source


class TestTouchedBackingFiles:
    """Whose time has moved, and perhaps nothing else."""

    @pytest.fixture
    def chain(self, area: Path) -> Iterator[list[opened_source.Source]]:
        """An overlay and a base."""
        with contextlib.ExitStack() as stack:
            for name in ("overlay", "base"):
                (area / name).write_bytes(b"before")
            yield [stack.enter_context(opened(area / name)) for name in ("overlay", "base")]

    def test_touched_backing_file_with_different_content_is_a_change(
        self, area: Path, chain: list[opened_source.Source]
    ) -> None:
        """What is there now is not what was converted."""

        def compare() -> None:
            raise conditions.VerifyFailed(path="out", problem="the contents are not the same")

        with (
            pytest.raises(conditions.SourceChanged, match="base"),
            source_change.watched(chain, compare),
        ):
            (area / "base").write_bytes(b"after!")

    def test_backing_file_changed_during_the_comparison_is_a_change(
        self, area: Path, chain: list[opened_source.Source]
    ) -> None:
        """Who writes on and on is never compared."""

        def compare() -> None:
            (area / "base").write_bytes(b"again.")

        with (
            pytest.raises(conditions.SourceChanged, match="base"),
            source_change.watched(chain, compare),
        ):
            (area / "base").write_bytes(b"after!")

    def test_backing_file_with_another_size_is_a_change_without_comparison(
        self, area: Path, chain: list[opened_source.Source]
    ) -> None:
        """No comparison is made."""
        with (
            pytest.raises(conditions.SourceChanged, match="had 6 bytes and has 7"),
            source_change.watched(chain, lambda: None),
        ):
            (area / "base").write_bytes(b"longer.")

    def test_touched_source_is_a_change(
        self, area: Path, chain: list[opened_source.Source]
    ) -> None:
        """Nobody has a reason to touch it."""
        with (
            pytest.raises(conditions.SourceChanged, match="overlay"),
            source_change.watched(chain, lambda: None),
        ):
            os.utime(area / "overlay")


class TestTimestamps:
    """What tells that a file was written to."""

    @pytest.mark.parametrize("kind", ["ext4", "ext4 of whole seconds", "xfs", "tmpfs", "ramfs"])
    def test_write_right_after_the_open_is_detected(self, mounts: Mounts, kind: str) -> None:
        """Though the file was written in the same tick of the kernel's clock, or second, before."""
        place = {
            "ext4": lambda: mounts.on_a_loop("ext4", "place"),
            "ext4 of whole seconds": lambda: mounts.on_a_loop("ext4", "place", options=SMALL),
            "xfs": lambda: mounts.on_a_loop("xfs", "place"),
            "tmpfs": lambda: mounts.in_memory("tmpfs", "place"),
            "ramfs": lambda: mounts.in_memory("ramfs", "place"),
        }[kind]()
        path = place / "in"
        for _ in range(2 if "seconds" in kind else 30):
            path.write_bytes(b"before")
            with opened(path) as source, path.open("r+b", buffering=0) as file:
                file.write(b"after!")
                with pytest.raises(conditions.SourceChanged, match="it was written to"):
                    source_change.check([source])

    def test_old_source_is_opened_without_waiting(self, area: Path) -> None:
        """And one whose time lies far in the future."""
        for then in (0.5, 10**6, time.time() + 10**6):
            (area / "in").write_bytes(b"old")
            os.utime(area / "in", (then, then))
            began = time.monotonic()
            with opened(area / "in") as source:
                assert time.monotonic() - began < 1
                source_change.check([source])
