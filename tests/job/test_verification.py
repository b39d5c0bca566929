"""A qemu-img that says 0 is not taken at its word: what it wrote is looked at."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grants
import loop_devices
import pytest
import refusals
import whole_job
from children import in_child
from harness.mounts import Mounts

from convertd_core import conditions, messages, results, values
from convertd_daemon import channel
from convertd_daemon.job import (
    context,
    endpoints,
    local_grant,
    secrets,
    stages,
)
from convertd_daemon.job.files import paths
from convertd_daemon.job.qemu import (
    backing_chain,
    conversion,
    execution,
    plan,
    verification,
)
from convertd_daemon.job.reflink import sharing

MIB = 1024 * 1024
NO_SECRETS = secrets.Secrets()


@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """A job that stands still between two of its steps, and is not confined."""

    grant: values.ConvertGrant
    plan: stages.ConversionPlan
    ends: endpoints.Endpoints
    runner: execution.Runner
    layout: sharing.Layout | None

    def convert(self) -> tuple[results.Warning, ...]:
        """Run qemu-img, or share blocks, whatever the plan says."""
        if self.layout is not None:
            sharing.carry_out(self.grant, self.plan, self.layout, self.runner.context)
            return ()
        return conversion.convert(self.grant, self.plan, self.ends, NO_SECRETS, self.runner)

    def check(self) -> None:
        """Look at size or header."""
        verification.check(self.grant, self.plan, self.ends, self.runner)

    def compare(self) -> None:
        """Compare with the source."""
        verification.compare(self.grant, self.plan, self.ends, NO_SECRETS, self.runner)


@contextlib.contextmanager
def planned(grant: values.ConvertGrant) -> Iterator[Steps]:
    """Open, probe and plan."""
    ours, theirs = channel.Channel.pair()
    setup = whole_job.setup()
    with contextlib.ExitStack() as stack, ours, theirs:
        worker = stack.enter_context(execution.opened(setup))
        runner = execution.Runner(worker, context.JobContext(ours, 60.0))
        source = stack.enter_context(paths.open_source(grant.source, grant.peer))
        dest = stack.enter_context(endpoints.open_dest(grant, setup))
        both = endpoints.Endpoints(
            chain=backing_chain.follow(grant, source, runner, stack), dest=dest
        )
        made = plan.make(grant, both.members, both.try_out(grant.request.dest.format))
        prospect = sharing.prepare(grant, both, runner, stack)
        decision = sharing.choose(grant, made, both, prospect, runner)
        dest.check_room(decision.plan, source.fd)
        yield Steps(grant, decision.plan, decision.ends, runner, decision.layout)


def grant_in(area: Path, *, verify: bool = False, **asked: object) -> values.ConvertGrant:
    """Leave to convert `in`, which is raw, to `out`, so."""
    rules = grants.Rules(roots=(grants.files(area),))
    request = grants.to(grants.request(area / "in", area / "out"), **asked)
    return rules.convert(dataclasses.replace(request, verify=verify))


@pytest.fixture
def area(area: Path) -> Path:
    """A root with an image in it."""
    (area / "in").write_bytes(os.urandom(MIB))
    return area


def outcome_of(
    grant: values.ConvertGrant, act: Callable[[Steps], object]
) -> conditions.Failure | None:
    """What a plan or its steps are refused with, in a child that may start programs."""

    def steps() -> None:
        with planned(grant) as standing:
            act(standing)

    return in_child(lambda: refusals.refusal_of(steps))


class TestResultSizeAndHeader:
    """What is always, or cheaply, looked at."""

    @pytest.mark.parametrize("kind", ["raw", "qcow2", "vmdk"])
    def test_correct_result_passes_the_check(self, area: Path, kind: str) -> None:
        """Its header too, if that is asked for."""

        def act(steps: Steps) -> None:
            steps.convert()
            steps.check()
            steps.compare()

        assert outcome_of(grant_in(area, format=kind, verify=True), act) is None

    @pytest.mark.parametrize(("kind", "words"), [("raw", "has 0 bytes"), ("qcow2", "nothing was")])
    def test_empty_result_fails_the_check(self, area: Path, kind: str, words: str) -> None:
        """Of whatever format."""
        failure = outcome_of(grant_in(area, format=kind), Steps.check)
        assert failure is not None
        assert failure.reason == "VERIFY_FAILED"
        assert words in failure.message

    @pytest.mark.parametrize("size", [MIB - 512, MIB + 512, 2 * MIB])
    def test_raw_result_of_the_wrong_size_fails_the_check(self, area: Path, size: int) -> None:
        """To the byte."""

        def act(steps: Steps) -> None:
            os.ftruncate(steps.ends.dest.fd, size)
            steps.check()

        failure = outcome_of(grant_in(area), act)
        assert failure is not None
        assert failure.message.endswith(f"has {size} bytes instead of {MIB}")

    def test_result_with_an_invalid_header_fails_the_verification(self, area: Path) -> None:
        """If verification is asked for; otherwise that of a job that took long."""

        def act(steps: Steps) -> None:
            os.write(steps.ends.dest.fd, b"no header" * 100)
            steps.check()

        assert outcome_of(grant_in(area, format="qcow2"), act) is None
        failure = outcome_of(grant_in(area, format="qcow2", verify=True), act)
        assert failure is not None
        assert failure.message.endswith(f"is unreadable of 0 bytes, not {MIB}")

    def test_header_is_checked_after_a_long_job_without_verification(self, area: Path) -> None:
        """It can afford that."""

        def act(steps: Steps) -> None:
            os.write(steps.ends.dest.fd, b"no header" * 100)
            steps.runner.context.started -= verification.LONG_S + 1
            steps.check()

        assert outcome_of(grant_in(area, format="qcow2"), act) is not None

    def test_result_with_the_wrong_virtual_size_fails_the_check(self, area: Path) -> None:
        """By its header."""

        def act(steps: Steps) -> None:
            path = f"/proc/{os.getpid()}/fd/{steps.ends.dest.fd}"
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", path, "2M"]
            subprocess.run(argv, check=True)
            steps.check()

        failure = outcome_of(grant_in(area, format="qcow2", verify=True), act)
        assert failure is not None
        assert failure.message.endswith(f"is qcow2 of {2 * MIB} bytes, not {MIB}")

    def test_device_result_has_no_size_or_header_check(self, area: Path) -> None:
        """It has its own size, and what is on it is compared if that is asked for."""
        with loop_devices.made(area) as volumes:
            device = volumes.add("lv", 2 * MIB)
            rules = grants.Rules(roots=(grants.files(area), grants.devices(volumes.links)))
            grant = rules.convert(grants.request(area / "in", device))

            def act(steps: Steps) -> None:
                steps.check()
                steps.convert()
                steps.compare()
                assert steps.ends.rules()
                steps.ends.dest.flush(steps.plan)

            assert outcome_of(grant, act) is None
            assert volumes.bytes_on(device) == (area / "in").read_bytes().ljust(2 * MIB, b"\0")


class TestContentComparison:
    """What a guest would see."""

    def test_verification_detects_one_different_byte(self, area: Path) -> None:
        """Wherever it is."""

        def act(steps: Steps) -> None:
            steps.convert()
            byte = os.pread(steps.ends.dest.fd, 1, MIB - 1)
            os.pwrite(steps.ends.dest.fd, bytes([byte[0] ^ 1]), MIB - 1)
            steps.check()
            steps.compare()

        failure = outcome_of(grant_in(area), act)
        assert failure is not None
        assert failure.message.endswith("the contents are not the same")

    def test_result_that_can_not_be_compared_fails_the_verification(self, area: Path) -> None:
        """Here its header is gone."""

        def act(steps: Steps) -> None:
            steps.convert()
            os.pwrite(steps.ends.dest.fd, bytes(4096), 0)
            steps.compare()

        failure = outcome_of(grant_in(area, format="qcow2"), act)
        assert failure is not None
        assert failure.reason == "READ_FAILED"


@pytest.fixture(params=["xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, mounts: Mounts) -> Path:
    """A root with an image in it, on a file system that shares blocks."""
    point = mounts.on_a_loop(request.param, "sharing")
    (point / "in").write_bytes(os.urandom(MIB) + bytes(100))
    return point


class TestClones:
    """Raw to raw on a file system that shares blocks."""

    def test_clone_has_the_content_of_the_source(self, disk: Path) -> None:
        """Rounded up to whole sectors, as qemu does; both can be written on their own."""

        def act(steps: Steps) -> None:
            assert steps.plan.method is results.Method.REFLINK
            steps.convert()
            steps.check()
            steps.compare()
            steps.ends.dest.flush(steps.plan)
            steps.ends.dest.assign_name(steps.grant)

        assert outcome_of(grant_in(disk), act) is None
        expected = (disk / "in").read_bytes().ljust(MIB + 512, b"\0")
        assert (disk / "out").read_bytes() == expected
        with (disk / "in").open("r+b") as source:
            source.write(b"changed")
        assert (disk / "out").read_bytes() == expected

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            ({"format": "vmdk"}, "only raw and qcow2"),
            ({"preallocation": values.Preallocation.FULL}, "not possible with preallocation"),
            ({"format": "qcow2", "compression": values.Compression.ZLIB}, "with compression"),
        ],
        ids=["another format", "preallocation", "compression"],
    )
    def test_options_that_require_writing_cause_a_copy(
        self, disk: Path, asked: dict[str, object], reason: str
    ) -> None:
        """Somebody wants bytes to be written."""
        grant = grant_in(disk)
        request = grants.to(grant.request, **asked)
        assert copied_because(dataclasses.replace(grant, request=request), reason) is None

    def test_request_for_a_copy_gets_one(self, disk: Path) -> None:
        """Blocks of its own."""
        grant = asking(grant_in(disk), reflink=values.Reflink.NEVER)
        assert copied_because(grant, "the request asks for a copy") is None

    @pytest.mark.parametrize("end", ["source", "dest"])
    def test_policy_that_forbids_sharing_at_one_end_causes_a_copy(
        self, disk: Path, end: str
    ) -> None:
        """Of whichever root."""
        grant = grant_in(disk)
        place = getattr(grant, end)
        root = dataclasses.replace(place.root, reflink=False)
        closed = dataclasses.replace(grant, **{end: dataclasses.replace(place, root=root)})
        assert copied_because(closed, "the policy does not allow it in the root images") is None
        failure = outcome_of(asking(closed, reflink=values.Reflink.ALWAYS), Steps.check)
        assert failure is not None
        assert failure.reason == "REFLINK_NOT_POSSIBLE"
        assert dict(failure.values)["path"] == place.path
        assert "the policy does not allow it in the root images" in failure.message

    @pytest.mark.parametrize(
        "changes",
        [
            {"cache_mode": values.CacheMode.WRITEBACK},
            {"rate_limit_bytes_per_second": MIB},
        ],
        ids=["a-cache-mode", "a-rate"],
    )
    def test_options_about_the_copy_do_not_cause_one(
        self, disk: Path, changes: dict[str, object]
    ) -> None:
        """They hold: nothing is read, nothing is in the page cache."""

        def act(steps: Steps) -> None:
            assert steps.plan.method is results.Method.REFLINK

        assert outcome_of(asking(grant_in(disk), **changes), act) is None

    def test_copy_is_made_where_the_file_system_does_not_share_blocks(self, mounts: Mounts) -> None:
        """It is tried, and nothing is left of the attempt."""
        point = mounts.on_a_loop("ext4", "copying")
        (point / "in").write_bytes(os.urandom(MIB))
        grant = grant_in(point)
        assert copied_because(grant, "the file system does not share blocks") is None
        assert refused_at(asking(grant, reflink=values.Reflink.ALWAYS)) == point / "out"

    def test_copy_is_made_from_another_file_system(self, disk: Path, area: Path) -> None:
        """Of the same kind or not."""
        roots = (grants.files(area), grants.files(disk, name="sharing"))
        request = grants.request(area / "in", disk / "out")
        grant = grants.Rules(roots=roots).convert(request)
        reason = "source and destination are in different file systems"
        assert copied_because(grant, reason) is None
        assert refused_at(asking(grant, reflink=values.Reflink.ALWAYS)) == disk / "out"

    @pytest.mark.parametrize("reflink", [values.Reflink.AUTO, values.Reflink.ALWAYS])
    def test_disk_without_space_for_the_metadata_is_full(
        self, mounts: Mounts, reflink: values.Reflink
    ) -> None:
        """The clone fails in the middle; a copy has no space either. Nothing is left."""
        point = mounts.on_a_loop("xfs", "full")
        in_pieces(point / "in", 25 * MIB)
        fill(point, leave_bytes=64 * 1024)
        failure = outcome_of(asking(grant_in(point), reflink=reflink), Steps.check)
        assert failure is not None
        assert failure.reason == "NO_SPACE"
        assert sorted(os.listdir(point)) == ["fill", "in"]

    @pytest.mark.parametrize("kind", ["raw", "qcow2"])
    def test_sharing_ends_when_the_time_of_the_job_is_over(self, disk: Path, kind: str) -> None:
        """It is asked for after each piece."""

        def act(steps: Steps) -> None:
            assert steps.plan.method is results.Method.REFLINK
            steps.runner.context.duration_s = 0.0
            steps.convert()

        failure = outcome_of(grant_in(disk, format=kind), act)
        assert failure is not None
        assert failure.reason == "DURATION_EXCEEDED"

    def test_image_larger_than_the_free_space_is_shared(self, disk: Path) -> None:
        """It needs no space of its own. A copy is refused."""
        free = os.statvfs(disk)
        filler = bytes([1]) * MIB
        with (disk / "in").open("ab") as source:
            for _ in range(free.f_bavail * free.f_frsize * 3 // 5 // MIB):
                source.write(filler)

        def act(steps: Steps) -> None:
            assert steps.plan.method is results.Method.REFLINK
            assert steps.plan.needed_bytes == 0
            steps.convert()
            steps.check()
            steps.ends.dest.flush(steps.plan)

        assert outcome_of(grant_in(disk), act) is None
        copy = asking(grant_in(disk), reflink=values.Reflink.NEVER)
        failure = outcome_of(copy, Steps.check)
        assert failure is not None
        assert failure.reason == "NO_SPACE"


def in_pieces(path: Path, data_bytes: int) -> None:
    """Write a file of data and as many holes, each of one block of 4 KiB, in turn."""
    path.write_bytes(os.urandom(2 * data_bytes))
    os.sync()
    digging = ["fallocate", "--dig-holes", str(path)]
    with path.open("r+b") as file:
        for start in range(0, 2 * data_bytes, 8192):
            os.pwrite(file.fileno(), bytes(4096), start)
        os.fsync(file.fileno())
    subprocess.run(digging, check=True)


def fill(point: Path, *, leave_bytes: int) -> None:
    """Take all the space of a file system but that."""
    with (point / "fill").open("wb", buffering=0) as file:
        for piece in (bytes(MIB), bytes(4096)):
            with contextlib.suppress(OSError):
                while file.write(piece):
                    pass
        os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - leave_bytes)
        os.fsync(file.fileno())


def asking(grant: values.ConvertGrant, **changes: object) -> values.ConvertGrant:
    """The same grant, for a request that differs."""
    return dataclasses.replace(grant, request=dataclasses.replace(grant.request, **changes))  # type: ignore[arg-type]


def copied_because(grant: values.ConvertGrant, reason: str) -> conditions.Failure | None:
    """See that qemu-img is run, for that reason, and that its result is right."""

    def act(steps: Steps) -> None:
        assert steps.plan.method is results.Method.QEMU_IMG
        assert reason in steps.plan.method_reason
        assert os.fstat(steps.ends.dest.fd).st_size == 0
        steps.convert()
        steps.check()
        steps.compare()

    return outcome_of(grant, act)


def refused_at(grant: values.ConvertGrant) -> Path | None:
    """Which path is named by a refusal to share blocks."""
    failure = outcome_of(grant, Steps.check)
    if failure is None or failure.reason != "REFLINK_NOT_POSSIBLE":
        return None
    return Path(dict(failure.values)["path"])


class TestLocalGrants:
    """The grant of who needs no daemon."""

    def test_local_grant_for_a_conversion_allows_everything_with_own_ids(self) -> None:
        """With the ids of this process, and every format."""
        asked = grants.request("/a/b", "/c/d")
        grant = local_grant.grant(messages.LocalRequest(qemu_img="", request=asked))
        assert isinstance(grant, values.ConvertGrant)
        assert (grant.source.path, grant.dest.path) == ("/a/b", "/c/d")
        assert (grant.peer.uid, grant.peer.gid) == (os.geteuid(), os.getegid())
        assert grant.read_formats == values.FORMATS
        assert grant.overwrite is values.OverwriteScope.ANY

    def test_local_grant_for_an_inspection_allows_one_image(self) -> None:
        """At one image."""
        asked = values.InspectRequest(source=values.Source(path="/a/b"))
        grant = local_grant.grant(messages.LocalRequest(qemu_img="", request=asked))
        assert isinstance(grant, values.InspectGrant)
        assert grant.source.path == "/a/b"

    def test_local_grant_is_refused_for_an_invalid_request(self) -> None:
        """What can't be meant is refused as by a daemon."""
        order = messages.LocalRequest(qemu_img="", request=grants.request("a", "/b"))
        assert refusals.reason_of(lambda: local_grant.grant(order)) == "BAD_PATH"


def test_local_conversion_without_qemu_img_is_refused_with_the_reason(area: Path) -> None:
    """And that is said, with the reason."""
    missing = dataclasses.replace(whole_job.setup(), path=str(area / "missing"))

    def act() -> conditions.Failure | None:
        return refusals.refusal_of(lambda: execution.opened(missing).__enter__())

    failure = in_child(act)
    assert failure is not None
    assert failure.reason == "UNSUPPORTED"
    assert "No such file or directory" in failure.message
