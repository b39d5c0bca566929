"""convertctl, as a user meets it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import images, waiting
from harness.callers import ALICE, CONVERTCTL, make_reachable

if TYPE_CHECKING:
    from tests.client.conftest import Fake

CONVERT = ("convert", "/images/a", "/images/b", "-O", "raw", "--label")


def lines(out: str) -> list[dict[str, Any]]:
    """What `--json` printed."""
    return [json.loads(line) for line in out.splitlines()]


def await_line(process: subprocess.Popen[bytes], text: str) -> None:
    """Wait until a program says something on standard error."""
    assert process.stderr is not None
    while text not in (line := process.stderr.readline().decode()):
        assert line, f"it ended before {text!r}"


def end_of(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """A program's exit status, and what it still said."""
    out, err = process.communicate(timeout=waiting.DEADLINE_S)
    return process.returncode, out.decode(), err.decode()


# --- what it says ------------------------------------------------------------------------------


def test_convertctl_without_a_terminal_prints_few_lines(fake: Fake) -> None:
    """One for each phase, and for every tenth; the result on standard output."""
    ran = fake.convertctl(*CONVERT, "")
    assert ran.status == 0
    said = ran.err.splitlines()
    assert said[0] == "queued, 2 before it"
    assert [line.split(",")[0] for line in said[1:-2]] == [
        f"converting {percent} %" for percent in range(0, 101, 10)
    ]
    assert "10.0 MiB/s" in said[2]
    assert "9.00 s left" in said[2]
    assert said[-2] == "flushing"
    assert said[-1] == "convertctl: warning: 2 snapshots are not in it (SNAPSHOTS_DROPPED)"
    assert ran.out == (
        "/images/b: raw of 100 MiB, 50.0 MiB on disk, 2.00 s at 50.0 MiB/s, "
        "cache mode none (direct writes work)\n"
    )


def test_convertctl_quiet_prints_only_warnings(fake: Fake) -> None:
    """No progress and no result."""
    ran = fake.convertctl(*CONVERT, "", "-q")
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == "convertctl: warning: 2 snapshots are not in it (SNAPSHOTS_DROPPED)\n"


def test_convertctl_json_prints_one_object_per_line(fake: Fake) -> None:
    """Progress, and last the result."""
    ran = fake.convertctl(*CONVERT, "", "--json")
    told = lines(ran.out)
    assert (ran.status, ran.err) == (0, "")
    assert {line["event"] for line in told[:-1]} == {"progress"}
    assert told[0]["phase"] == "queued"
    assert told[-1]["event"] == "result"
    assert told[-1]["plan"]["command"] == ["qemu-img", "convert", "/images/a"]


def test_convertctl_refusal_is_an_error_line_and_a_hint(fake: Fake) -> None:
    """And status 1."""
    ran = fake.convertctl(*CONVERT, "refuse:PERMISSION_DENIED:PERMISSION_DENIED", "-q")
    first, hint = ran.err.splitlines()
    assert (ran.status, ran.out) == (1, "")
    assert first.startswith("convertctl: the fake refuses /images/")
    assert first.endswith("(PERMISSION_DENIED)")
    assert hint == "  `convertctl access` shows what you may do"


def test_convertctl_unknown_outcome_is_reported_with_advice(fake: Fake) -> None:
    """Before anything is repeated."""
    ran = fake.convertctl(*CONVERT, "die", "-q")
    assert ran.status == 1
    assert ran.err.endswith("  check whether the destination exists before you try again\n")


def test_convertctl_json_refusal_has_status_reason_message_and_metadata(fake: Fake) -> None:
    """Status, reason, message and metadata."""
    ran = fake.convertctl(*CONVERT, "refuse:RESOURCE_EXHAUSTED:NO_SPACE", "--json")
    error = lines(ran.out)[-1]
    assert (ran.status, ran.err) == (1, "")
    assert (error["event"], error["status"]) == ("error", "RESOURCE_EXHAUSTED")
    assert (error["reason"], error["metadata"]["free_bytes"]) == ("NO_SPACE", "7")


def test_convertctl_dry_run_shows_the_plan(fake: Fake) -> None:
    """And what would be."""
    ran = fake.convertctl(*CONVERT, "", "--dry-run")
    assert ran.out.startswith("/images/b: would be raw of 100 MiB")
    assert "command       qemu-img convert /images/a" in ran.out
    assert "needs         10 bytes of 1.95 KiB free" in ran.out
    assert "method        qemu-img: the disks differ" in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("jobs",),
        ("info", "/images/a"),
        (*CONVERT, "refuse:ABORTED:DEST_BUSY"),
        ("info", "/images/\x1b[31m"),
        ("jobs", "\x1b[31m"),
        ("\x1b[31m",),
        ("jobs", "--json"),
        ("info", "/images/a", "--json"),
    ],
    ids=ascii,
)
def test_convertctl_escapes_names_for_the_terminal(arguments: tuple[str, ...], fake: Fake) -> None:
    """Paths, and what the shell made of a pattern."""
    ran = fake.convertctl(*arguments)
    for character in ran.out + ran.err:
        assert character == "\n" or character.isprintable()


def test_convertctl_jobs_prints_a_table(fake: Fake) -> None:
    """One line each."""
    heading, job = fake.convertctl("jobs").out.splitlines()
    assert heading.split() == ["ID", "USER", "STATE", "SINCE", "SOURCE", "DEST", "LABEL"]
    assert job.startswith("cafe01  4242  queued, 3 before it")
    assert job.endswith("/images/b.raw (raw)  nightly")


def test_convertctl_info_access_and_cancel_print_text(fake: Fake) -> None:
    """What is empty is left out."""
    ran = fake.convertctl("info", "/images/a")
    info = ran.out
    assert "virtual size  1.00 GiB (1073741824 bytes)" in info
    assert re.search(r"snapshots     before \(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\), after\n", info)
    assert "bitmaps       changed (64.0 KiB a bit, auto)" in info
    assert "state" not in info
    assert ran.err == "convertctl: warning: somebody writes it (IMAGE_IN_USE)\n"
    access = fake.convertctl("access").out
    assert "an operator" in access
    assert "you may, by grants[0]:" in access
    assert "read below /images, with your own rights" in access
    assert fake.convertctl("cancel", "cafe01").out == "job cafe01 is being cancelled\n"
    refused = fake.convertctl("cancel", "other")
    assert refused.status == 1
    assert "`convertctl jobs` lists your jobs" in refused.err


def test_convertctl_missing_daemon_is_reported_with_advice(absent: Fake) -> None:
    """Within a few seconds."""
    began = time.monotonic()
    ran = absent.convertctl("jobs")
    assert time.monotonic() - began < 15
    assert ran.status == 1
    assert ran.err.startswith(f"convertctl: there is no {absent.socket}: the daemon is not")
    assert "--local" in ran.err


def test_convertctl_socket_option_overrides_the_environment(fake: Fake, tmp_path: Path) -> None:
    """As options do."""
    ran = fake.convertctl("--socket", str(tmp_path / "other.sock"), "jobs")
    assert "other.sock" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("convert", "/a", "/b"),
        ("convert", "/a", "-O", "raw"),
        (*CONVERT, "", "--mode", "rw"),
        (*CONVERT, "", "--rate-limit", "fast"),
        (*CONVERT, "", "--timeout", "0"),
        (*CONVERT, "", "--cache", "unsafe"),
        (*CONVERT, "", "--source-secret-file", "/nowhere"),
        ("--socket", "/" + "x" * 200, "jobs"),
        ("completion", "tcsh"),
    ],
    ids=" ".join,
)
def test_convertctl_usage_error_has_exit_status_2(arguments: tuple[str, ...], fake: Fake) -> None:
    """And reaches no daemon."""
    ran = fake.convertctl(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("convertctl: ")
    assert "--help` shows the usage" in ran.err
    assert fake.log == []


def test_convertctl_passes_each_option_to_the_daemon(fake: Fake, tmp_path: Path) -> None:
    """A file that the caller can't read himself is the daemon's to judge."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"hunter2")
    options = "-f qcow2 -c --compression zstd --cache none --overwrite --mode 0640 --group disk "
    options += "--preallocation off --rate-limit 50M --verify --timeout 10m --quiet"
    ran = fake.convertctl(*CONVERT, "x", *options.split(), "--source-secret-file", str(secret))
    assert ran.status == 0, ran


def test_convertctl_sends_a_source_its_user_can_not_read(fake: Fake) -> None:
    """For that is what the daemon is for."""
    arguments = ("convert", "/etc/shadow", "/images/b", "-O", "raw", "-q")
    environment = {"CONVERTD_SOCKET": str(fake.socket)}
    assert ALICE.run([CONVERTCTL, *arguments], env=environment).status == 0


def test_convertctl_version_is_that_of_the_package(fake: Fake) -> None:
    """Without a daemon."""
    ran = fake.convertctl("--version")
    assert ran.status == 0
    assert ran.out.startswith("convertctl, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_convertctl_completion_prints_the_shell_script(shell: str, fake: Fake) -> None:
    """By click."""
    ran = fake.convertctl("completion", shell)
    assert ran.status == 0
    assert f"_CONVERTCTL_COMPLETE={shell}_complete" in ran.out


def test_convertctl_completes_commands_formats_and_paths() -> None:
    """As bash asks for it."""
    for words, last, wanted in (
        ("convertctl co", 1, "plain,convert"),
        ("convertctl convert a b -O q", 5, "plain,qcow2"),
        ("convertctl convert /", 2, "file,"),
    ):
        environment = {
            "_CONVERTCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(last),
        }
        assert wanted in ALICE.run([CONVERTCTL], env=environment).out


# --- on a terminal -----------------------------------------------------------------------------


def test_convertctl_progress_bar_is_removed_at_the_end(fake: Fake) -> None:
    """With phase, percentage and rate; the cursor is back in the end."""
    ours, theirs = pty.openpty()
    process = ALICE.popen(
        [CONVERTCTL, *CONVERT, "hang"],
        env={"CONVERTD_SOCKET": str(fake.socket), "TERM": "xterm", "COLUMNS": "120"},
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with process:
        while b"40%" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # EIO: the other end is closed
            pass
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 130
    assert "converting" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.rstrip().endswith("cancelled; nothing was left at /images/b")


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_convertctl_signal_cancels_the_job_and_waits_for_its_end(
    number: signal.Signals, status: int, fake: Fake
) -> None:
    """So that it can say what was left."""
    process = fake.convertctl_started(*CONVERT, "hang")
    await_line(process, "converting")
    process.send_signal(number)
    assert end_of(process) == (status, "", "convertctl: cancelled; nothing was left at /images/b\n")
    assert "cancel cafe01" in fake.log


def test_convertctl_cancelled_overwrite_says_that_the_old_file_is_unchanged(fake: Fake) -> None:
    """For something is there."""
    process = fake.convertctl_started(*CONVERT, "hang", "--overwrite")
    await_line(process, "converting")
    process.send_signal(signal.SIGINT)
    assert "/images/b is as it was" in end_of(process)[2]


def test_convertctl_cancelled_job_is_an_error_in_json(fake: Fake) -> None:
    """The last line, and the status of the signal."""
    process = fake.convertctl_started(*CONVERT, "hang", "--json")
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["phase"] != "converting":
        pass
    process.send_signal(signal.SIGINT)
    status, out, _ = end_of(process)
    assert status == 130
    assert lines(out)[-1]["reason"] == "CANCELLED_BY_CALLER"


def test_convertctl_signal_after_publishing_reports_success(fake: Fake) -> None:
    """The job had been published: it is told as done."""
    process = fake.convertctl_started(*CONVERT, "finish")
    await_line(process, "queued")
    process.send_signal(signal.SIGINT)
    status, out, _ = end_of(process)
    assert status == 0
    assert out.startswith("/images/b: raw of 100 MiB")


def test_convertctl_second_signal_exits_without_waiting(fake: Fake) -> None:
    """And says no more than is certain; the call's end cancels the job."""
    process = fake.convertctl_started(*CONVERT, "silent")
    fake.await_noted("convert silent")
    process.send_signal(signal.SIGINT)
    # Another one: two of the same at once would be one.
    process.send_signal(signal.SIGTERM)
    status, _, err = end_of(process)
    # Of two that come at once, either may be the first: several threads take them.
    assert status in {130, 143}
    assert "stopped waiting" in err
    fake.await_noted("ended")


def test_convertctl_signal_with_an_unresponsive_daemon_exits(fake: Fake) -> None:
    """One signal is enough."""
    process = fake.convertctl_started(*CONVERT, "silent")
    fake.await_noted("convert silent")
    process.send_signal(signal.SIGINT)
    status, _, err = end_of(process)
    assert status == 130
    assert "stopped waiting" in err


def test_convertctl_other_command_ends_on_ctrl_c(absent: Fake) -> None:
    """While it waits for a daemon."""
    process = absent.convertctl_started("jobs")
    waiting.until(lambda: _threads_of(process) > 2, "it waits for the daemon")
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (130, "", "")


def _threads_of(process: subprocess.Popen[bytes]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


# --- without a daemon --------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of the user's own with an image that takes a minute at 1 MiB/s."""
    make_reachable(tmp_path)
    images.bulky(tmp_path / "a.raw")
    for path in (tmp_path, tmp_path / "a.raw"):
        os.chown(path, ALICE.uid, ALICE.gid)
    return tmp_path


def test_convertctl_local_converts_and_inspects_with_own_rights(home: Path) -> None:
    """No daemon, and relative paths."""
    script = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
    here = [sys.executable, "-I", "-c", script, str(home), CONVERTCTL]
    done = ALICE.run([*here, "convert", "--local", "a.raw", "b.qcow2", "-O", "qcow2", "-q"])
    assert (done.status, done.err) == (0, "")
    assert images.identical(home / "a.raw", home / "b.qcow2")
    info = ALICE.run([*here, "info", "--local", "b.qcow2", "--json"])
    assert info.json()["format"] == "qcow2"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_convertctl_signal_cancels_a_local_conversion(
    number: signal.Signals, status: int, home: Path
) -> None:
    """And nothing is left."""
    options = ("-O", "qcow2", "-f", "raw", "--rate-limit", "1M")
    process = ALICE.popen(
        [CONVERTCTL, "convert", "--local", str(home / "a.raw"), str(home / "b"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    await_line(process, "converting")
    process.send_signal(number)
    ended, _, err = end_of(process)
    assert ended == status
    assert err.endswith(f"convertctl: cancelled; nothing was left at {home}/b\n")
    assert os.listdir(home) == ["a.raw"]
