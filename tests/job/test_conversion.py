"""While qemu-img runs: what it prints becomes progress, and what it fails of a condition."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import encrypting
import grants
import pytest
import whole_job
from children import in_child
from harness import waiting
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import conditions, messages, results, values
from convertd_daemon import channel
from convertd_daemon.job import context, endpoints, progress
from convertd_daemon.job.files import device_dest, file_dest, paths
from convertd_daemon.job.qemu import (
    backing_chain,
    conversion,
    execution,
    plan,
)
from convertd_daemon.linux import clock_getcpuclockid
from convertd_daemon.sandbox.program import ConfinedProgram

MIB = 1024 * 1024


class Front:
    """A front that notes the progress it is told."""

    def __init__(self) -> None:
        ours, self.channel = channel.Channel.pair()
        self.context = context.JobContext(ours, 60.0)

    def outputs(self) -> list[tuple[str, float]]:
        """Phase and per cent of each message so far."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                message, _ = self.channel.receive(messages.Progressed, wait=False)
                found.append((message.progress.phase.value, message.progress.percent))
        return found

    def close(self) -> None:
        """Close both ends."""
        self.context.channel.close()
        self.channel.close()


@pytest.fixture
def front() -> Iterator[Front]:
    """Somebody to tell."""
    made = Front()
    yield made
    made.close()


@pytest.fixture
def written(area: Path) -> Iterator[int]:
    """What a conversion writes to."""
    descriptor = os.open(area, os.O_TMPFILE | os.O_RDWR, 0o600)
    yield descriptor
    os.close(descriptor)


def printed(*percents: float) -> bytes:
    """What qemu-img -p prints."""
    return b"".join(f"    ({percent:.2f}/100%)\r".encode() for percent in percents)


class TestProgress:
    """By qemu-img's own words."""

    @pytest.fixture(autouse=True)
    def at_any_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tell it as soon as there is more to tell, but where a test says otherwise."""
        monkeypatch.setattr(progress, "PROGRESS_S", 0.0)

    def test_progress_is_rate_limited(
        self, front: Front, written: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody sees a hundred steps of a second; the end of the writing is told in any case."""
        monkeypatch.setattr(progress, "PROGRESS_S", 60.0)
        observer = conversion.Observer(front.context, written, 1.0)
        observer.on_output(printed(0.0, 10.0, 20.0))
        observer.on_output(printed(99.0, 100.0))
        assert front.outputs() == [("converting", 0.0), ("flushing", 100.0)]

    def test_progress_event_has_the_newest_value(
        self, front: Front, written: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was held back is not made up for: the newest counts."""
        now = 5.0
        monkeypatch.setattr(progress, "PROGRESS_S", 0.1)
        monkeypatch.setattr(time, "monotonic", lambda: now)
        observer = conversion.Observer(front.context, written, 1.0)
        observer.on_output(printed(1.0, 2.0))
        now = 5.05
        observer.on_output(printed(3.0))
        now = 5.11
        observer.on_output(printed(4.0, 5.0))
        assert front.outputs() == [("converting", 1.0), ("converting", 4.0)]

    def test_progress_rises_in_steps_of_one_per_cent(self, front: Front, written: int) -> None:
        """And never backwards; 100 comes before the flushing, which is a phase of its own."""
        observer = conversion.Observer(front.context, written, 1.0)
        observer.on_output(printed(0.0, 0.5, 1.01, 1.99, 1.2, 50.0, 49.0, 99.99, 100.0, 100.0))
        assert front.outputs() == [
            ("converting", 0.0),
            ("converting", 1.01),
            ("converting", 50.0),
            ("converting", 99.99),
            ("flushing", 100.0),
        ]

    @given(st.lists(st.integers(1, 200)))
    def test_progress_is_parsed_however_the_output_is_split(self, pieces: list[int]) -> None:
        """A pipe knows no lines."""
        front, text = Front(), printed(*range(0, 101, 7), 100.0)
        observer = conversion.Observer(front.context, 0, 1.0)
        for size in [*pieces, len(text)]:
            observer.on_output(text[:size])
            text = text[size:]
        heard = [percent for _, percent in front.outputs()]
        front.close()
        assert heard == [float(percent) for percent in [*range(0, 101, 7), 100]]

    @given(st.lists(st.binary()))
    def test_unexpected_output_is_ignored(self, pieces: list[bytes]) -> None:
        """A qemu-img that an image has taken over may print what it likes."""
        front = Front()
        observer = conversion.Observer(front.context, 0, 1.0)
        for piece in [*pieces, b"(999.9/100%)\r", b"x" * 10_000]:
            observer.on_output(piece)
        assert all(0 <= percent <= 100 for _, percent in front.outputs())
        front.close()

    def test_output_without_line_ends_is_not_stored(self, front: Front) -> None:
        """It could be as long as the program likes."""
        observer, piece = conversion.Observer(front.context, 0, 1.0), b"x" * 10_000
        tracemalloc.start()
        try:
            for _ in range(1000):
                observer.on_output(piece)
            kept_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept_bytes < 50 * conversion.LONGEST_LINE

    def test_unread_progress_is_dropped(self, front: Front, written: int) -> None:
        """A job never waits for its front."""
        for _ in range(100):
            observer = conversion.Observer(front.context, written, 1.0)
            observer.on_output(printed(*range(101)))
        assert 0 < len(front.outputs()) < 100 * 101

    def test_disconnected_front_ends_the_job_at_the_next_progress(
        self, front: Front, written: int
    ) -> None:
        """The front is gone, and so is the caller."""
        front.channel.close()
        with pytest.raises(context.Cancelled):
            conversion.Observer(front.context, written, 1.0).on_output(printed(1.0))


class Clock:
    """A program that is looked at, with a processor time of its own."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command)

    @property
    def child(self) -> ConfinedProgram:
        """As the sandbox gives one; of it the pid alone counts."""
        return cast("ConfinedProgram", self.process)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class TestStall:
    """Nothing moves: no output, no block, no processor time."""

    @pytest.fixture
    def idle(self) -> Iterator[Clock]:
        """A program that does nothing."""
        made = Clock("sleep", "100")
        yield made
        made.close()

    @pytest.fixture
    def observer(self, front: Front, written: int, idle: Clock) -> conversion.Observer:
        """One that has seen the program come to rest, and has no patience."""
        made = conversion.Observer(front.context, written, 0.0)

        def rests() -> bool:
            try:
                made.on_tick(idle.child)
            except conditions.Stalled:
                return True
            return False

        waiting.until(rests, "the program comes to rest")
        return made

    def test_stall_is_detected(self, observer: conversion.Observer, idle: Clock) -> None:
        """With the limit that was passed."""
        with pytest.raises(conditions.Stalled, match=r"no progress for 0\.0 seconds"):
            observer.on_tick(idle.child)

    def test_stall_is_not_reported_while_the_percentage_rises(
        self, observer: conversion.Observer, idle: Clock
    ) -> None:
        """However slowly."""
        observer.on_output(printed(3.0))
        observer.on_tick(idle.child)
        with pytest.raises(conditions.Stalled):
            observer.on_tick(idle.child)

    def test_stall_is_not_reported_while_output_is_unread(
        self, observer: conversion.Observer, idle: Clock
    ) -> None:
        """A program that says more than a pipe holds waits for us, and may compute little."""
        observer.on_output(b"[\n")
        observer.on_tick(idle.child)
        with pytest.raises(conditions.Stalled):
            observer.on_tick(idle.child)

    def test_stall_is_not_reported_while_blocks_are_written(
        self, observer: conversion.Observer, idle: Clock, written: int
    ) -> None:
        """To the result, through our own descriptor."""
        os.posix_fallocate(written, 0, MIB)
        observer.on_tick(idle.child)
        with pytest.raises(conditions.Stalled):
            observer.on_tick(idle.child)

    def test_stall_is_not_reported_while_processor_time_is_used(
        self, front: Front, written: int
    ) -> None:
        """Compressing, or reading zeroes."""
        busy = Clock("sh", "-c", "while :; do :; done")
        observer = conversion.Observer(front.context, written, 0.2)
        with contextlib.closing(busy):
            for _ in range(3):
                before = clock_getcpuclockid.cpu_time_s(busy.process.pid)
                waiting.until(
                    lambda before=before: (  # type: ignore[misc]
                        clock_getcpuclockid.cpu_time_s(busy.process.pid) > before + 0.02
                    ),
                    "it computes",
                )
                observer.on_tick(busy.child)

    def test_stall_is_not_reported_while_the_result_is_flushed(
        self, observer: conversion.Observer, idle: Clock
    ) -> None:
        """That is the disk's work, and bounded by the job's duration alone."""
        observer.on_output(printed(100.0))
        for _ in range(3):
            observer.on_tick(idle.child)

    def test_stall_is_not_reported_after_the_program_has_ended(
        self, front: Front, written: int
    ) -> None:
        """Which is about to be noticed anyway."""
        gone = Clock("true")
        gone.process.wait()
        conversion.Observer(front.context, written, 60.0).on_tick(gone.child)


@pytest.fixture
def both(area: Path) -> Iterator[endpoints.Endpoints]:
    """Two open ends of a conversion."""
    (area / "in").touch()
    rules = grants.Rules(roots=(grants.files(area),))
    grant = rules.convert(grants.request(area / "in", area / "out"))
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        target = stack.enter_context(paths.open_target(grant))
        dest = stack.enter_context(file_dest.create(grant, target, whole_job.setup()))
        link = backing_chain.ChainLink(source=source, info=plan.raw_info(0, 0))
        yield endpoints.Endpoints(chain=(link,), dest=dest)


def failed(both: endpoints.Endpoints, said: str, status: int = 1) -> conditions.Failure:
    """What a run of qemu-img that ended so failed of."""
    planned = grants.plan_of(0, needed_bytes=5)
    outcome = execution.Outcome(status=status, stdout=b"", stderr=said)
    return conversion.failure_of(outcome, planned, both).failure()


CACHE = results.CacheChoice(mode=values.CacheMode.NONE, reason="")
FD = "qemu-img: Could not open '/proc/self/fd/8'"


class TestQemuImgFailures:
    """What qemu-img says, and how it ends."""

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ("qemu-img: error while writing at byte 0: No space left on device", "NO_SPACE"),
            ("qemu-img: error while writing at byte 0: Disk quota exceeded", "QUOTA_EXCEEDED"),
            (f'{FD}: Failed to get "write" lock\nIs another process using it?', "IMAGE_IN_USE"),
            (f'{FD}: Failed to get shared "write" lock', "IMAGE_IN_USE"),
            (f"{FD}: Invalid password, cannot unlock any keyslot", "WRONG_SECRET"),
            ("qemu-img: Cannot allocate memory", "OUT_OF_MEMORY"),
            ("qemu-img: Unknown compression type 'zstd'", "UNSUPPORTED"),
            ("qemu-img: error while reading at byte 0: Input/output error", "READ_FAILED"),
            ("qemu-img: error while writing at byte 0: Input/output error", "WRITE_FAILED"),
            ("qemu-img: flush failed", "WRITE_FAILED"),
            (f"qemu-img: {FD}: error while converting raw: Read-only file system", "WRITE_FAILED"),
            (f"qemu-img: {FD}: error while converting raw: Invalid argument", "CONVERSION_FAILED"),
            ("qemu-img: something that nobody has heard of", "CONVERSION_FAILED"),
            ("", "CONVERSION_FAILED"),
        ],
    )
    def test_qemu_img_error_messages_map_to_conditions(
        self, both: endpoints.Endpoints, said: str, expected: str
    ) -> None:
        """The result is discarded anyway; they decide only what the caller reads."""
        assert failed(both, said).reason == expected

    def test_only_kernel_error_text_of_qemu_img_is_passed_on(
        self, both: endpoints.Endpoints
    ) -> None:
        """Never a name: it could be that of a file on this host."""
        known = failed(both, "qemu-img: error while reading at byte 0: Input/output error")
        assert known.message.endswith("could not be read completely: Input/output error")
        unknown = failed(both, "qemu-img: error while reading '/etc/shadow': no luck")
        assert "shadow" not in unknown.message
        assert "the daemon's log has qemu-img's words" in unknown.message

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTRAP])
    def test_qemu_img_out_of_memory_is_reported(
        self, both: endpoints.Endpoints, number: signal.Signals
    ) -> None:
        """The kernel's, or its own."""
        assert failed(both, "", -number).reason == "OUT_OF_MEMORY"

    def test_qemu_img_crash_is_reported_with_its_signal(self, both: endpoints.Endpoints) -> None:
        """An image may have done it."""
        failure = failed(both, "", -signal.SIGSEGV)
        assert failure.message.endswith("qemu-img failed: ended by SIGSEGV")

    def test_full_device_is_not_reported_as_a_full_file_system(
        self, both: endpoints.Endpoints
    ) -> None:
        """There is no mount point at which to make room."""
        place = grants.Rules(roots=(grants.devices("/dev/vg"),)).place("/dev/vg/lv")
        device = device_dest.DeviceDest(place=place, fd=both.dest.fd, size_bytes=0, group=None)
        thin = dataclasses.replace(both, dest=device)
        failure = failed(thin, "qemu-img: error while writing: No space left on device")
        assert failure.reason == "WRITE_FAILED"
        assert failure.message.startswith("/dev/vg/lv: ")


class TestConversion:
    """With the real program."""

    def converted(self, area: Path, *passphrases: bytes, **asked: object) -> whole_job.JobEvents:
        """Convert `in` to `out`, by a whole job."""
        rules = grants.Rules(roots=(grants.files(area),))
        source = asked.pop("source", None) or values.Source(path=str(area / "in"), format="raw")
        assert isinstance(source, values.Source)
        request = dataclasses.replace(grants.request(area / "in", area / "out"), source=source)
        return whole_job.run(rules.convert(grants.to(request, **asked)), *passphrases)

    def test_run_reports_its_phases_in_order(self, area: Path) -> None:
        """Each of them, and the percentage never falls."""
        (area / "in").write_bytes(os.urandom(4 * MIB))
        outcome = self.converted(area, format="qcow2")
        told = [item.progress for item in outcome.events if isinstance(item, messages.Progressed)]
        phases = list(dict.fromkeys(item.phase for item in told))
        assert phases == [
            values.Phase.PREPARING,
            values.Phase.CONVERTING,
            values.Phase.FLUSHING,
            values.Phase.PUBLISHING,
        ]
        percents = [item.percent for item in told]
        assert percents == sorted(percents)

    def test_source_with_truncated_clusters_is_not_converted(self, area: Path) -> None:
        """It would read as zeroes, and qemu-img would say nothing. See test_integrity."""
        (area / "raw").write_bytes(os.urandom(4 * MIB))
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*argv, str(area / "raw"), str(area / "in")], check=True)
        os.truncate(area / "in", MIB)
        source = values.Source(path=str(area / "in"), format="qcow2")
        assert self.converted(area, source=source).reason == "IMAGE_REFUSED"

    def test_conversion_between_encrypted_images_needs_both_passphrases(
        self, area: Path, luks: Path
    ) -> None:
        """Each at its own end; a wrong one has its own condition."""
        (area / "in").write_bytes(luks.read_bytes())
        source = values.Source(
            path=str(area / "in"), format="luks", encryption=values.SourceEncryption()
        )
        fast = values.DestinationEncryption(iter_time_milliseconds=1)
        wrong = self.converted(
            area, b"wrong", b"new", source=source, format="luks", encryption=fast
        )
        assert wrong.reason == "WRONG_SECRET"
        done = self.converted(area, PASSPHRASE, source=source)
        assert done.published.published
        assert (area / "out").read_bytes() == b"\x5a" * MIB

    def test_encrypted_source_without_its_passphrase_is_refused(
        self, area: Path, luks: Path
    ) -> None:
        """Found out by its header."""
        (area / "in").write_bytes(luks.read_bytes())
        source = values.Source(path=str(area / "in"))
        assert self.converted(area, source=source).reason == "SECRET_MISSING"

    def test_disconnected_caller_ends_the_job_and_leaves_nothing(self, area: Path) -> None:
        """Closing the job's channel is enough."""
        (area / "in").write_bytes(os.urandom(16 * MIB))
        rules = grants.Rules(roots=(grants.files(area),))
        slow = grants.slowly(grants.request(area / "in", area / "out"))
        with whole_job.started(rules.convert(slow)) as (_, job_channel):
            while not isinstance(job_channel.receive(*messages.FROM_JOB)[0], messages.Planned):
                pass
        assert os.listdir(area) == ["in"]

    def test_sigterm_ends_the_job_and_leaves_nothing(self, area: Path) -> None:
        """As the broker sends it."""
        (area / "in").write_bytes(os.urandom(16 * MIB))
        rules = grants.Rules(roots=(grants.files(area),))
        slow = grants.slowly(grants.request(area / "in", area / "out"))
        with whole_job.started(rules.convert(slow)) as (job, job_channel):
            while not isinstance(job_channel.receive(*messages.FROM_JOB)[0], messages.Planned):
                pass
            os.kill(job.pid, signal.SIGTERM)
            with contextlib.suppress(channel.Closed):
                while True:
                    assert not isinstance(
                        job_channel.receive(*messages.FROM_JOB)[0], messages.Failed
                    )
        assert os.listdir(area) == ["in"]

    def test_job_over_its_time_limit_is_ended(self, area: Path) -> None:
        """By the policy's `duration`."""
        (area / "in").write_bytes(os.urandom(16 * MIB))
        limits = grants.limits(duration_seconds=0.3)
        rules = grants.Rules(roots=(grants.files(area),), limits=limits)
        slow = grants.slowly(grants.request(area / "in", area / "out"))
        assert whole_job.run(rules.convert(slow)).reason == "DURATION_EXCEEDED"
        assert os.listdir(area) == ["in"]


PASSPHRASE = b"correct horse"


@pytest.fixture(scope="module")
def luks(shared_area: Path) -> Path:
    """An encrypted image of one MiB. Making one takes seconds: qemu-img measures the machine."""
    (shared_area / "raw").write_bytes(b"\x5a" * MIB)
    secret = ["--object", f"secret,id=s,data={PASSPHRASE.decode()}"]
    options = ["-f", "raw", "-O", "luks", "-o", "key-secret=s,iter-time=1"]
    path = shared_area / "luks"
    encrypting.qemu_img("convert", *secret, *options, shared_area / "raw", path)
    return path


class TestJobContext:
    """What ends a job before its work is done."""

    def test_job_context_with_a_connected_front_does_not_cancel(self, front: Front) -> None:
        """And time that is left."""
        front.context.check()
        assert 0 <= front.context.seconds < 60

    def test_job_context_with_a_disconnected_front_cancels(self, front: Front) -> None:
        """Wherever it looks, and whatever it says."""
        front.channel.close()
        for act in (
            front.context.check,
            lambda: front.context.send(messages.CallAbandoned(call=1)),
            lambda: front.context.progress(values.Phase.CONVERTING),
        ):
            with pytest.raises(context.Cancelled):
                act()

    def test_event_that_is_too_long_to_send_is_reported_as_such(self, front: Front) -> None:
        """An image may have thousands of snapshots."""
        with pytest.raises(conditions.Unsupported, match="does not fit into a message"):
            front.context.send(
                messages.Failed(failure=conditions.Failure(reason="x" * 200_000, message=""))
            )

    def test_sigterm_is_deferred_while_the_result_is_published(self) -> None:
        """What is published is reported first."""

        def act() -> list[str]:
            context.cancel_on_sigterm()
            seen = []
            try:
                with context.defer_sigterm():
                    os.kill(os.getpid(), signal.SIGTERM)
                    seen.append("published")
            except context.Cancelled:
                seen.append("cut")
            return seen

        assert in_child(act) == ["published", "cut"]
