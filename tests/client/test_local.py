"""local: images converted for a user without rights, and without a daemon."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images, waiting
from harness.callers import ALICE, CONVERTCTL, Ran, make_reachable, owner_of

from convertd_client import errors, job
from convertd_core import messages

SCRIPT: Final = """
import dataclasses, json, sys
import convertd_client
from convertd_client import local
told = json.loads(sys.argv[1])
stop_at = told.pop("stop_at", None)

def hear(progress):
    print(progress.phase, flush=True)
    if progress.phase == stop_at:
        raise KeyboardInterrupt

try:
    if told.pop("method") == "inspect":
        done = local.inspect(*told.pop("args"), **told)
    else:
        done = local.convert(*told.pop("args"), on_progress=hear, **told)
    end = {"value": dataclasses.asdict(done)}
except convertd_client.ConvertError as error:
    end = {"error": type(error).__name__, "reason": error.reason, "message": str(error)}
except KeyboardInterrupt:
    end = {"error": "KeyboardInterrupt"}
end["loaded"] = "grpc" in sys.modules or "google.protobuf" in sys.modules
print(json.dumps(end, default=str))
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A directory of the user's own, with an image in it."""
    make_reachable(tmp_path)
    images.small(tmp_path / "a.raw")
    for path in (tmp_path, tmp_path / "a.raw"):
        os.chown(path, ALICE.uid, ALICE.gid)
    yield tmp_path
    shutil.rmtree(tmp_path)


def begin(method: str, *args: object, **options: object) -> subprocess.Popen[bytes]:
    """Call one of the functions as the user."""
    told = json.dumps({"method": method, "args": [str(item) for item in args], **options})
    return ALICE.popen([sys.executable, "-I", "-c", SCRIPT, told], stdout=subprocess.PIPE)


def end_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What came of a call."""
    out, _ = process.communicate(timeout=waiting.DEADLINE_S)
    end: dict[str, Any] = json.loads(out.splitlines()[-1])
    return end


def run(method: str, *args: object, **options: object) -> dict[str, Any]:
    """Call one of the functions as the user, and give what came of it."""
    return end_of(begin(method, *args, **options))


def await_phase(process: subprocess.Popen[bytes], phase: str) -> None:
    """Wait until a conversion is in a phase."""
    assert process.stdout is not None
    while (line := process.stdout.readline().decode().strip()) != phase:
        assert line, f"it ended before {phase}"


def jobs_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The job programs that a process has started, and that live."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    try:
        with open(path, encoding="ascii") as children:
            return [int(pid) for pid in children.read().split()]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("dest_format", ["qcow2", "vmdk", "vdi"])
def test_local_conversion_and_back_preserves_the_image(dest_format: str, home: Path) -> None:
    """What is made is the user's, and what a policy would have said by default."""
    there, back = home / f"there.{dest_format}", home / "back.raw"
    first = run("convert", home / "a.raw", there, dest_format=dest_format, source_format="raw")
    second = run("convert", there, back, dest_format="raw")
    assert "value" in first, first
    assert first["value"]["published"]
    assert second["value"]["source_format"] == dest_format
    assert images.identical(home / "a.raw", back)
    assert owner_of(there) == (ALICE.uid, ALICE.gid, 0o600)


def test_local_conversion_does_not_load_grpc_or_protobuf(home: Path) -> None:
    """Nor loaded."""
    assert not run("convert", home / "a.raw", home / "b", dest_format="qcow2")["loaded"]


def test_local_result_has_the_fields_of_a_daemon_result(home: Path) -> None:
    """Plan included."""
    options = {"verify": True, "compress": True, "mode": 0o640}
    value = run("convert", home / "a.raw", home / "b", dest_format="qcow2", **options)["value"]
    assert value["verified"]
    assert not value["replaced"]
    assert value["plan"]["compression"] == "zlib"
    assert value["plan"]["chain"][0]["path"] == str(home / "a.raw")
    assert value["bytes_per_second"] > 0
    assert value["allocated_size_bytes"] == (home / "b").stat().st_blocks * 512
    assert stat.S_IMODE((home / "b").stat().st_mode) == 0o640


def test_local_encrypted_image_is_created_and_read_with_its_passphrase(home: Path) -> None:
    """Which goes by the channel to its job."""
    script = (
        "from convertd_client import local; import sys; a, b, c = sys.argv[1:];"
        "local.convert(a, b, dest_format='qcow2', source_format='raw', dest_secret=b'hunter2');"
        "local.convert(b, c, dest_format='raw', source_format='qcow2', source_secret=b'hunter2')"
    )
    paths = [str(home / name) for name in ("a.raw", "b.qcow2", "c.raw")]
    assert ALICE.run([sys.executable, "-I", "-c", script, *paths]).status == 0
    assert images.identical(home / "a.raw", home / "c.raw")
    assert run("inspect", home / "b.qcow2")["value"]["encrypted"]
    refused = run("convert", home / "b.qcow2", home / "d", dest_format="raw")
    assert (refused["error"], refused["reason"]) == ("InvalidArgument", "SECRET_MISSING")


def test_local_image_is_inspected(home: Path) -> None:
    """With qemu-img's own answer under the name that was given."""
    image = images.converted(home / "a.raw", home / "b.qcow2", "qcow2")
    subprocess.run(["qemu-img", "snapshot", "-c", "mark", image], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "changed"], check=True)
    os.chown(image, ALICE.uid, ALICE.gid)
    value = run("inspect", image)["value"]
    assert (value["format"], value["virtual_size_bytes"]) == ("qcow2", 8 << 20)
    (snapshot,) = value["snapshots"]
    assert (snapshot["id"], snapshot["name"], snapshot["vm_state_size_bytes"]) == ("1", "mark", 0)
    taken = json.loads(value["qemu_img_json"])["snapshots"][0]["date-sec"]
    assert int(datetime.datetime.fromisoformat(snapshot["create_time"]).timestamp()) == taken
    assert value["bitmaps"] == [
        {"name": "changed", "granularity_bytes": 65536, "flags": ["auto"]},
    ]
    assert (value["compressed"], value["warnings"]) == (False, [])
    assert json.loads(value["qemu_img_json"])["filename"] == str(image)


def test_local_source_the_user_may_not_read_is_refused(home: Path) -> None:
    """By the kernel: nobody's rights but one's own."""
    os.chown(home / "a.raw", 0, 0)
    end = run("convert", home / "a.raw", home / "b", dest_format="qcow2")
    assert (end["error"], end["reason"]) == ("FailedPrecondition", "ACCESS_REFUSED")
    assert os.listdir(home) == ["a.raw"]


def test_local_existing_destination_is_kept_unless_overwrite_is_requested(home: Path) -> None:
    """As with a daemon."""
    dest = home / "b"
    dest.write_text("precious")
    os.chown(dest, ALICE.uid, ALICE.gid)
    end = run("convert", home / "a.raw", dest, dest_format="raw")
    assert (end["error"], end["reason"]) == ("AlreadyExists", "DEST_EXISTS")
    assert dest.read_text() == "precious"
    assert run("convert", home / "a.raw", dest, dest_format="raw", overwrite=True)["value"]
    assert images.identical(home / "a.raw", dest)


def test_local_dry_run_returns_the_plan_and_writes_nothing(home: Path) -> None:
    """validate_only."""
    end = run("convert", home / "a.raw", home / "b", dest_format="qcow2", validate_only=True)
    assert not end["value"]["published"]
    assert end["value"]["plan"]["dest_format"] == "qcow2"
    assert os.listdir(home) == ["a.raw"]


def test_local_relative_path_is_below_the_working_directory_of_the_caller(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whoever calls, not of the job."""
    monkeypatch.chdir(home)
    script = (
        "import os, sys; os.chdir(sys.argv[1]); from convertd_client import local;"
        "local.convert('a.raw', 'b', dest_format='raw')"
    )
    assert ALICE.run([sys.executable, "-I", "-c", script, str(home)]).status == 0
    assert images.identical(home / "a.raw", home / "b")


# --- an end before the end -----------------------------------------------------------------------

SLOW: Final = {
    "dest_format": "qcow2",
    "source_format": "raw",
    "rate_limit": 1 << 20,
    "reflink": "never",
}


@pytest.fixture
def bulky(home: Path) -> Path:
    """An image that takes a minute at the rate limit of SLOW."""
    path = images.bulky(home / "bulky.raw")
    os.chown(path, ALICE.uid, ALICE.gid)
    return path


def assert_nothing_left(home: Path, pids: list[int]) -> None:
    """See that no job lives, and that nothing was made."""
    for pid in pids:
        waiting.until(functools.partial(_is_gone, pid), "the job is gone")
    assert sorted(os.listdir(home)) == ["a.raw", "bulky.raw"]


def test_local_timeout_ends_the_job_and_leaves_nothing(home: Path, bulky: Path) -> None:
    """And says that it was the timeout."""
    process = begin("convert", bulky, home / "b", timeout=15.0, **SLOW)
    await_phase(process, "converting")
    pids = jobs_of(process)
    end = end_of(process)
    assert (end["error"], end["reason"]) == ("DeadlineExceeded", "TIMEOUT")
    assert pids
    assert_nothing_left(home, pids)


def test_local_exception_in_on_progress_ends_the_job_and_leaves_nothing(
    home: Path, bulky: Path
) -> None:
    """When the call is left, the job is gone."""
    process = begin("convert", bulky, home / "b", stop_at="converting", **SLOW)
    assert end_of(process)["error"] == "KeyboardInterrupt"
    assert_nothing_left(home, [])


def _is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_local_caller_that_ends_takes_its_job_along(
    number: signal.Signals, home: Path, bulky: Path
) -> None:
    """Whether it can tidy up or not."""
    process = begin("convert", bulky, home / "b", **SLOW)
    await_phase(process, "converting")
    pids = jobs_of(process)
    process.send_signal(number)
    process.communicate(timeout=waiting.DEADLINE_S)
    assert pids
    assert_nothing_left(home, pids)


def test_local_job_that_is_killed_has_an_unknown_outcome(home: Path, bulky: Path) -> None:
    """It can't say whether it had published."""
    process = begin("convert", bulky, home / "b", **SLOW)
    await_phase(process, "converting")
    (pid,) = jobs_of(process)
    os.kill(pid, signal.SIGKILL)
    end = end_of(process)
    assert (end["error"], end["reason"]) == ("OutcomeUnknown", "JOB_DIED")
    assert_nothing_left(home, [pid])


def test_local_job_that_dies_at_startup_has_done_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken installation, for instance."""
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    conversion = job.Conversion(b"[]", ())
    with pytest.raises(errors.Internal) as caught:
        conversion.run(None, None)
    assert (caught.value.reason, caught.value.metadata) == ("JOB_DIED", {"status": "3"})


def test_local_conversion_cancelled_before_it_runs_is_not_done() -> None:
    """The signal may come first."""
    conversion = job.Conversion(b"[]", ())
    conversion.cancel()
    with pytest.raises(errors.Cancelled):
        conversion.run(None, None)


def test_local_conversion_without_qemu_img_is_unimplemented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And said before anything is started."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(errors.Unimplemented, match="qemu-img"):
        job.qemu_img()


PATHS: Final = {
    "unset": "--unset=PATH",
    "empty": "PATH=",
    "begins with nothing": "PATH=:/usr/bin",
    "has nothing between": "PATH=/usr/sbin::/usr/bin",
    "a dot": "PATH=.:/usr/bin",
    "relative": "PATH=bin:/usr/bin",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_local_qemu_img_in_the_working_directory_is_not_run(path: str, home: Path) -> None:
    """Whoever makes images there may have made that too: only absolute directories count."""
    for directory in (home, home / "bin"):
        directory.mkdir(exist_ok=True)
        shutil.copy("/bin/true", directory / "qemu-img")
    convert = ["convert", "--local", "a.raw", "b.qcow2", "-O", "qcow2", "-q"]
    # By the interpreter, for without PATH a script's `env` would look in the working directory too.
    argv = ["/usr/bin/env", f"--chdir={home}", path, sys.executable, "-I", CONVERTCTL, *convert]
    assert ALICE.run(argv) == Ran(status=0, out="", err="")
    assert images.identical(home / "a.raw", home / "b.qcow2")


def test_local_qemu_img_is_the_first_in_an_absolute_path_directory(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a shell."""
    shutil.copy("/usr/bin/qemu-img", home / "qemu-img")
    monkeypatch.setenv("PATH", f"bin:{home}:/usr/bin")
    assert job.qemu_img() == str(home / "qemu-img")


def test_local_job_program_in_the_working_directory_is_not_run(home: Path) -> None:
    """Though Python looks there first, for all but what is installed beside the client."""
    (home / "convertd_daemon").mkdir()
    (home / "convertd_daemon" / "__init__.py").write_text("raise SystemExit(3)", encoding="utf-8")
    script = (
        "import sys; sys.path.insert(0, '');"
        "from convertd_client import local; local.convert('a.raw', 'b', dest_format='raw')"
    )
    argv = ["/usr/bin/env", f"--chdir={home}", sys.executable, "-I", "-c", script]
    assert ALICE.run(argv) == Ran(status=0, out="", err="")
    assert images.identical(home / "a.raw", home / "b")


def test_local_client_without_the_job_program_reports_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package of somebody else's may have left it out."""
    monkeypatch.setattr(job, "__file__", str(tmp_path / "convertd_client" / "job.py"))
    with pytest.raises(errors.Unimplemented, match="convertd_daemon is not installed"):
        job.Conversion(b"[]", ()).run(None, None)


@pytest.mark.parametrize("executable", [None, "", "python3"])
def test_local_unknown_python_interpreter_is_not_searched_for(
    executable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that embeds Python may have none; "python3" alone would be searched for."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(errors.Unimplemented, match="does not tell where its interpreter is"):
        job.Conversion(b"[]", ()).run(None, None)


def test_local_request_can_be_decoded_by_the_job(home: Path) -> None:
    """Every field of its own types, and none besides: the job takes no other."""
    from convertd_client import conversion  # noqa: PLC0415 - beside the daemon's modules
    from convertd_core import codec, values  # noqa: PLC0415 - as above

    asked = conversion.asked(home / "a", "/b", "qcow2", {"mode": 0o600, "dest_secret": b"x"})
    read = codec.decode(job.encoded(asked.request), messages.LocalRequest)
    assert isinstance(read.request, values.ConvertRequest)
    assert read.request.dest.encryption == values.DestinationEncryption()
    assert dataclasses.asdict(read.request.dest)["mode"] == 0o600
    look = values.InspectRequest(source=values.Source(path="/a", format="raw"))
    assert codec.decode(job.encoded(look), messages.LocalRequest).request == look
