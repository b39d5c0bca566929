"""What qemu-img says of an image, judged: by answers that real images, and hostile ones, give."""

from __future__ import annotations

import datetime
import json
import os
from typing import cast

import grants
import pytest
import refusals
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import conditions, results, values
from convertd_daemon.job import stages
from convertd_daemon.job.files import opened_source
from convertd_daemon.job.qemu import execution, image_info, plan

FD = os.memfd_create("image")
"""What begins like a qcow2, so that qemu-img is asked for one where no format is stated."""
os.pwrite(FD, b"QFI\xfb\0\0\0\3", 0)

PATH = "/images/a"
SOURCE = opened_source.Source(
    place=grants.Rules(roots=(grants.files("/images"),)).place(PATH),
    fd=FD,
    size_bytes=1000,
    allocated_bytes=4096,
)
OPENING = f"qemu-img: Could not open '/proc/self/fd/{FD}': "

SNAPSHOT: dict[str, object] = {
    "id": "1",
    "name": "s",
    "vm-state-size": 5,
    "date-sec": 10,
    "date-nsec": 4_000_000_001,
    "vm-clock-sec": 3,
    "vm-clock-nsec": 2,
    "icount": 0,
}
BITMAP: dict[str, object] = {"name": "b", "granularity": 512, "flags": ["auto", "in-use"]}
NUMBERS = ("vm-state-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")
NO_NUMBERS = (-1, 2**63, 1.5, True, "1", None)


class Runner:
    """Answers as a qemu-img would, or one that an image has taken over."""

    def __init__(self, stdout: object = "", stderr: str = "", status: int = 0) -> None:
        text = stdout if isinstance(stdout, bytes) else json.dumps(stdout).encode()
        self.outcome = execution.Outcome(status=status, stdout=text, stderr=stderr)
        self.argv: tuple[str, ...] = ()

    def run(self, argv: tuple[str, ...], *_: object) -> execution.Outcome:
        """Give the answer."""
        self.argv = argv
        return self.outcome


def described(answer: dict[str, object], stated: str = "") -> stages.ProbedImage:
    """What an image is, by qemu-img's answer."""
    said = {"format": "qcow2", "virtual-size": 1024, **answer}
    return image_info.describe(
        SOURCE, stated, values.FORMATS, cast("execution.Runner", Runner(said))
    )[0]


def refused(stated: str = "", stderr: str = "", status: int = 1) -> conditions.Failure:
    """What an image is refused with, by qemu-img's complaint."""
    runner = cast("execution.Runner", Runner(stderr=stderr, status=status))
    failure = refusals.refusal_of(
        lambda: image_info.describe(SOURCE, stated, values.FORMATS, runner)
    )
    assert failure is not None
    return failure


class TestInfoOutput:
    """JSON, as `qemu-img info` prints it."""

    def test_info_output_is_parsed(self) -> None:
        """All that we use of it."""
        info = described(
            {
                "actual-size": 512,
                "cluster-size": 65536,
                "encrypted": True,
                "dirty-flag": True,
                "backing-filename": "base",
                "backing-filename-format": "raw",
                "snapshots": [{"name": "s"}],
                "format-specific": {
                    "type": "qcow2",
                    "data": {
                        "compat": "1.1",
                        "lazy-refcounts": False,
                        "refcount-bits": 16,
                        "bitmaps": [{"name": "b", "flags": ["auto"]}],
                        "encrypt": {"format": "luks", "slots": [{"active": True}]},
                    },
                },
            }
        )
        assert info == stages.ProbedImage(
            format="qcow2",
            virtual_size_bytes=1024,
            actual_size_bytes=512,
            cluster_size_bytes=65536,
            encrypted=True,
            dirty=True,
            backing_name="base",
            backing_format="raw",
            snapshots=("s",),
            bitmaps=("b",),
            details=(
                ("bitmaps.0.flags.0", "auto"),
                ("bitmaps.0.name", "b"),
                ("compat", "1.1"),
                ("encrypt.format", "luks"),
                ("encrypt.slots.0.active", "true"),
                ("lazy-refcounts", "false"),
                ("refcount-bits", "16"),
            ),
        )

    def test_missing_info_fields_have_defaults(self) -> None:
        """The allocated size is ours to know."""
        assert described({}) == stages.ProbedImage(
            format="qcow2", virtual_size_bytes=1024, actual_size_bytes=4096
        )

    def test_info_output_for_the_caller_has_the_path_of_the_caller(self) -> None:
        """Not the descriptor under which qemu-img saw the image."""
        said = {"format": "qcow2", "virtual-size": 1, "filename": f"/proc/self/fd/{FD}"}
        _, text = image_info.describe(
            SOURCE, "", values.FORMATS, cast("execution.Runner", Runner(said))
        )
        assert json.loads(text) == {**said, "filename": PATH}

    def test_format_specific_info_is_parsed(self) -> None:
        """A date may have more nanoseconds than a second has, and a VMDK says what it is."""
        said = {
            "snapshots": [SNAPSHOT],
            "format-specific": {
                "data": {
                    "bitmaps": [BITMAP],
                    "extents": [{"format": ""}, {"compressed": True}],
                }
            },
        }
        assert image_info.contents(PATH, json.dumps(said)) == stages.Contents(
            snapshots=(
                results.Snapshot(
                    id="1",
                    name="s",
                    vm_state_size_bytes=5,
                    create_time=datetime.datetime.fromtimestamp(14, tz=datetime.UTC),
                    vm_clock_seconds=3.000000002,
                ),
            ),
            bitmaps=(results.Bitmap(name="b", granularity_bytes=512, flags=("auto", "in-use")),),
            compressed=True,
        )

    def test_missing_format_specific_info_is_accepted(self) -> None:
        """Raw has nothing to be specific about."""
        assert image_info.contents(PATH, "{}") == stages.Contents()

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            *(("snapshots", {name: value}) for name in NUMBERS for value in NO_NUMBERS),
            ("snapshots", {"date-sec": 2**63 - 1}),
            ("snapshots", {"vm-clock-nsec": 2**63 - 1, "vm-clock-sec": 2**34}),
            ("snapshots", {"id": 1}),
            ("snapshots", {"name": None}),
            *(("bitmaps", {"granularity": value}) for value in NO_NUMBERS),
            ("bitmaps", {"name": ["b"]}),
            ("bitmaps", {"flags": [1]}),
            ("bitmaps", {"flags": None}),
            ("extents", 5),
            ("extents", [5]),
        ],
    )
    def test_invalid_format_specific_info_is_refused(self, kind: str, changes: object) -> None:
        """A number below zero or above what can be sent, a text that is none."""
        honest = {"snapshots": SNAPSHOT, "bitmaps": BITMAP}
        listed = [{**honest[kind], **changes}] if isinstance(changes, dict) else changes
        specific = {"format-specific": {"data": {kind: listed}}}
        text = json.dumps({"snapshots": listed} if kind == "snapshots" else specific)
        assert refusals.reason_of(lambda: image_info.contents(PATH, text)) == "IMAGE_REFUSED"

    def test_file_names_in_format_specific_info_are_dropped(self) -> None:
        """They are the host's."""
        extent = {"filename": f"/proc/self/fd/{FD}", "format": "SPARSE"}
        info = described({"format-specific": {"data": {"extents": [extent]}}})
        assert info.details == (("extents.0.format", "SPARSE"),)

    @pytest.mark.parametrize(
        "specific",
        [
            pytest.param({"data-file": "/etc/shadow"}, id="a-data-file"),
            pytest.param({"extents": [{"filename": "/etc/shadow"}]}, id="an-extent"),
            pytest.param(
                {"extents": [{"filename": f"/proc/self/fd/{FD}"}, {"filename": "x"}]},
                id="a-second-extent",
            ),
            pytest.param({"extents": [{"filename": f"/proc/self/fd/{FD}0"}]}, id="another-number"),
        ],
    )
    def test_image_with_external_data_is_refused(self, specific: dict[str, object]) -> None:
        """Though the sandbox would not let it be read."""
        reason = refusals.refusal_of(lambda: described({"format-specific": {"data": specific}}))
        assert reason is not None
        assert reason.message == f"{PATH}: the image is refused: its data is in another file"

    def test_corrupt_mark_of_an_image_is_reported(self) -> None:
        """By its own mark. Whether it may be read all the same is judged elsewhere: see damage."""
        corrupt: dict[str, object] = {"format-specific": {"data": {"corrupt": True}}}
        assert described(corrupt).corrupt
        assert not described({}).corrupt

    def test_encryption_other_than_luks_is_unsupported(self) -> None:
        """The old one of qcow2 is broken."""
        aes: dict[str, object] = {
            "encrypted": True,
            "format-specific": {"data": {"encrypt": {"format": "aes"}}},
        }
        assert refusals.reason_of(lambda: described(aes)) == "UNSUPPORTED"

    def test_format_other_than_stated_is_refused(self) -> None:
        """Whatever qemu-img made of it."""
        assert refusals.reason_of(lambda: described({}, "vmdk")) == "FORMAT_MISMATCH"

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"{",
            b"\xff",
            b"[" * 100_000,
            [],
            "text",
            None,
            {},
            {"format": "raw"},
            {"format": "raw", "virtual-size": None},
            {"format": "raw", "virtual-size": "many"},
            {"format": "raw", "virtual-size": float("inf")},
            {"format": "raw", "virtual-size": 1, "snapshots": 5},
            {"format": "raw", "virtual-size": 1, "snapshots": [5]},
            {"format": "raw", "virtual-size": 1, "snapshots": [{}]},
            {"format": "raw", "virtual-size": 1, "format-specific": []},
            {"format": "raw", "virtual-size": 1, "format-specific": {"data": 5}},
            {"format": "raw", "virtual-size": 1, "format-specific": {"data": {"extents": 5}}},
            {"format": "raw", "virtual-size": 1, "format-specific": {"data": {"extents": [{}]}}},
        ],
    )
    def test_invalid_info_output_is_a_refusal_of_the_image(self, answer: object) -> None:
        """Of the image, not a bug: it may have taken qemu-img over."""
        runner = cast("execution.Runner", Runner(answer))
        reason = refusals.reason_of(lambda: image_info.describe(SOURCE, "", values.FORMATS, runner))
        assert reason == "IMAGE_REFUSED"
        assert image_info.result_info(FD, "raw", runner) in {("", 0), ("raw", 1)}

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(
                        ["format", "virtual-size", "snapshots", "format-specific", "data", "name"]
                    ),
                    inner,
                )
            ),
        )
    )
    def test_random_info_output_is_an_image_or_a_refusal(self, answer: object) -> None:
        """Nothing else is raised, by any JSON."""
        runner = cast("execution.Runner", Runner(answer))
        refusals.refusal_of(lambda: image_info.describe(SOURCE, "", values.FORMATS, runner))
        image_info.result_info(FD, "raw", runner)


class TestInfoErrors:
    """What qemu-img says when it can't open an image goes to the journal alone."""

    @pytest.mark.parametrize(
        ("stderr", "expected"),
        [
            (f"{OPENING}Image is not in qcow2 format", "FORMAT_MISMATCH"),
            (f"{OPENING}Image not in VDI format (bad signature 0)", "FORMAT_MISMATCH"),
            (
                f'{OPENING}Failed to get shared "write" lock\nIs another process using…',
                "IMAGE_IN_USE",
            ),
            (f"{OPENING}Cannot allocate memory", "IMAGE_REFUSED"),
            (f"{OPENING}Could not open '/etc/shadow': Permission denied", "IMAGE_REFUSED"),
            (f"{OPENING}Could not open '/etc/shadow/x': Not a directory", "IMAGE_REFUSED"),
            ("", "IMAGE_REFUSED"),
        ],
    )
    def test_info_errors_are_distinguished(self, stderr: str, expected: str) -> None:
        """A format that was stated, and something else that is wrong."""
        failure = refused("qcow2", stderr)
        assert failure.reason == expected
        assert "shadow" not in failure.message

    def test_info_error_without_a_stated_format_is_no_mismatch(self) -> None:
        """Nothing was said that could be wrong."""
        failure = refused("", f"{OPENING}Image is not in qcow2 format")
        assert failure.message.endswith("qemu-img can't open it as qcow2 by itself")

    def test_info_error_does_not_reveal_whether_a_named_file_exists(self) -> None:
        """One answer, whatever the errno."""
        words = (
            "No such file or directory",
            "Permission denied",
            "Not a directory",
            "Is a directory",
        )
        answers = {refused("vmdk", f"{OPENING}Could not open '/etc/x': {word}") for word in words}
        assert len(answers) == 1

    def test_qemu_img_info_ended_by_a_signal_is_a_refusal(self) -> None:
        """Ended by a signal: its limits, or an image that broke it."""
        failure = refused("", "", status=-9)
        assert failure.message.endswith("qemu-img crashed while reading it")


class TestFormatDetection:
    """What a source is, and whether it may be read."""

    def test_source_stated_as_raw_is_not_probed(self) -> None:
        """A guest may have written anything into it."""
        runner = Runner()
        info = image_info.identify(SOURCE, "raw", values.FORMATS, cast("execution.Runner", runner))
        assert info == plan.raw_info(1000, 4096)
        assert runner.argv == ()

    def test_source_of_a_format_not_allowed_is_refused(self) -> None:
        """Found out, or declared; and no driver of it is run."""
        for stated in ("", "vmdk", "raw", "bochs"):
            runner = Runner({"format": stated, "virtual-size": 1})
            for ask in (image_info.identify, image_info.describe):
                reason = refusals.reason_of(
                    lambda stated=stated, runner=runner, ask=ask: ask(  # type: ignore[misc]
                        SOURCE, stated, frozenset({"luks"}), cast("execution.Runner", runner)
                    )
                )
                assert reason == "FORMAT_NOT_ALLOWED"
            assert runner.argv == ()

    def test_image_in_use_may_be_inspected_but_not_converted(self) -> None:
        """Inspect says so to qemu-img; a conversion does not."""
        for shared in (True, False):
            runner = Runner({"format": "qcow2", "virtual-size": 1})
            asked = cast("execution.Runner", runner)
            image_info.describe(SOURCE, "", values.FORMATS, asked, shared=shared)
            assert ("--force-share" in runner.argv) is shared


def test_unreadable_result_has_no_format_and_size() -> None:
    """No format, no size; nobody takes that for the source's."""
    broken = cast("execution.Runner", Runner(status=1))
    assert image_info.result_info(FD, "qcow2", broken) == ("", 0)
    fine = cast("execution.Runner", Runner({"format": "qcow2", "virtual-size": 5}))
    assert image_info.result_info(FD, "qcow2", fine) == ("qcow2", 5)
