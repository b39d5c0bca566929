"""Client and AsyncClient, against a daemon that is missing, stops, dies, refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
from harness import waiting
from harness.callers import MALLORY

if TYPE_CHECKING:
    from tests.client.conftest import Fake

both = pytest.mark.parametrize("kind", ["sync", "aio"])

WAIT_S = 60.0
"""What a client would wait for, longer than anything here takes on a busy machine."""


@both
def test_client_conversion_yields_plan_progress_and_result(kind: str, fake: Fake) -> None:
    """In that order, and typed."""
    calling = fake.converting(kind, verify=True)
    calling.await_phase("queued")
    calling.await_phase("flushing")
    result = calling.end()["value"]
    assert result["published"]
    assert result["verified"]
    assert result["dest_cache"] == {"mode": "none", "reason": "direct writes work"}
    assert result["plan"]["command"] == ["qemu-img", "convert", "/images/a"]
    assert result["warnings"][0]["reason"] == "SNAPSHOTS_DROPPED"


@both
def test_other_client_calls_return_their_types(kind: str, fake: Fake) -> None:
    """Each in its own type."""
    image = fake.call(kind, "inspect", "/images/a")["value"]
    assert (image["format"], image["format_specific"]) == ("qcow2", {"compat": "1.1"})
    first, second = image["snapshots"]
    assert first["create_time"] == "1970-01-01 00:00:01+00:00"
    assert second["create_time"] is None
    (bitmap,) = image["bitmaps"]
    assert (bitmap["granularity_bytes"], bitmap["flags"]) == (1 << 16, ["auto"])
    assert image["warnings"] == [{"reason": "IMAGE_IN_USE", "message": "somebody writes it"}]
    (job,) = fake.call(kind, "jobs")["value"]
    assert (job["state"], job["progress"]["queue_position"]) == ("queued", 3)
    assert fake.call(kind, "cancel", job["job_id"])["value"]["job_id"] == job["job_id"]
    assert fake.call(kind, "cancel", "another")["error"] == "NotFound"
    access = fake.call(kind, "access")["value"]
    assert access["grants"][0]["rule"] == "grants[0]"
    assert access["grants"][0]["roots"][0]["access"] == "caller"


@both
def test_unknown_event_and_enum_value_of_a_newer_daemon_are_tolerated(
    kind: str, fake: Fake
) -> None:
    """An event, and a value of an enum, that this client does not know."""
    calling = fake.converting(kind, "newer")
    calling.await_phase("unspecified")
    assert calling.end()["value"]["published"]


# --- a daemon that is not there ------------------------------------------------------------------


@both
def test_client_call_waits_for_a_restarting_daemon(kind: str, absent: Fake) -> None:
    """It is made once, and reaches the daemon once."""
    calling = absent.converting(kind, init={"wait_for_ready": 15})
    absent.start(wait=False)
    assert calling.end()["value"]["published"]
    assert absent.log == ["convert "]


@both
@pytest.mark.parametrize("method", ["convert", "jobs"])
def test_missing_socket_is_reported_after_the_wait(kind: str, method: str, absent: Fake) -> None:
    """Not for ever, and not with an error of gRPC's."""
    init = {"wait_for_ready": 0.4}
    if method == "convert":
        end = absent.convert(kind, init=init)
    else:
        end = absent.call(kind, method, init=init)
    assert (end["error"], end["reason"]) == ("Unreachable", "SOCKET_MISSING")
    assert str(absent.socket) in end["message"]
    assert end["seconds"] >= 0.4


@both
def test_missing_socket_is_reported_at_once_without_a_wait(kind: str, absent: Fake) -> None:
    """A call's own wait_for_ready=0 counts, and not the client's."""
    end = absent.convert(kind, init={"wait_for_ready": WAIT_S}, wait_for_ready=0)
    assert (end["error"], end["reason"]) == ("Unreachable", "SOCKET_MISSING")
    assert end["seconds"] < WAIT_S


@both
def test_missing_socket_is_reported_even_if_the_timeout_is_shorter(kind: str, absent: Fake) -> None:
    """Rather than to say that the daemon took too long."""
    end = absent.convert(kind, timeout=0.3)
    assert end["reason"] == "SOCKET_MISSING"


@both
def test_socket_without_a_listener_is_reported(kind: str, absent: Fake) -> None:
    """As a daemon leaves it that was killed."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(absent.socket))
    end = absent.convert(kind, wait_for_ready=0.3)
    assert (end["error"], end["reason"]) == ("Unreachable", "CONNECTION_REFUSED")


@both
def test_listener_that_never_replies_is_reported(kind: str, absent: Fake) -> None:
    """As systemd's socket is when the service behind it does not start."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(absent.socket))
        listener.listen()
        end = absent.convert(kind, wait_for_ready=0.3)
    assert (end["error"], end["reason"]) == ("Unreachable", "NOT_ANSWERING")


@both
@pytest.mark.parametrize("mode", [0o600, 0o000])
def test_socket_without_permission_is_reported_at_once(kind: str, mode: int, fake: Fake) -> None:
    """Waiting would not help."""
    os.chmod(fake.socket, mode)
    end = fake.convert(kind, caller=MALLORY, wait_for_ready=WAIT_S)
    assert (end["error"], end["reason"]) == ("Unreachable", "SOCKET_NOT_PERMITTED")
    assert str(MALLORY.uid) in end["message"]
    assert end["seconds"] < WAIT_S


@both
def test_file_that_is_not_a_socket_is_reported_at_once(kind: str, absent: Fake) -> None:
    """A mistyped path."""
    absent.socket.write_text("")
    end = absent.convert(kind)
    assert (end["error"], end["reason"]) == ("Unreachable", "NOT_A_SOCKET")


# --- a daemon that goes ------------------------------------------------------------------------


@both
def test_conversion_with_a_dying_daemon_has_an_unknown_outcome(kind: str, fake: Fake) -> None:
    """The error says so, and is none after which a program tries again."""
    end = fake.convert(kind, "die")
    assert (end["error"], end["reason"]) == ("OutcomeUnknown", "CONNECTION_LOST")
    assert "Unavailable" not in end["kinds"]


@both
def test_conversion_sent_to_a_daemon_is_never_retried(kind: str, fake: Fake) -> None:
    """Not even if another daemon is back while the call would still wait."""
    calling = fake.converting(kind, "hang", wait_for_ready=15)
    calling.await_phase("converting")
    fake.kill()
    fake.start()
    assert calling.end()["error"] == "OutcomeUnknown"
    assert fake.log == []


@both
def test_conversion_stream_without_a_result_has_an_unknown_outcome(kind: str, fake: Fake) -> None:
    """A stream that ends well and says nothing."""
    end = fake.convert(kind, "no-result")
    assert (end["error"], end["reason"]) == ("OutcomeUnknown", "NO_RESULT")


@both
def test_read_only_call_with_a_lost_reply_may_be_retried(kind: str, fake: Fake) -> None:
    """It changes nothing."""
    end = fake.call(kind, "inspect", "/images/bare:UNKNOWN")
    assert (end["error"], end["reason"]) == ("Unreachable", "CONNECTION_LOST")


# --- a daemon that refuses -----------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("status", "reason", "kinds"),
    [
        ("PERMISSION_DENIED", "PERMISSION_DENIED", ["PermissionDenied"]),
        ("RESOURCE_EXHAUSTED", "NO_SPACE", ["NoSpace", "ResourceExhausted"]),
        ("DATA_LOSS", "PUBLISHED_BUT_NOT_DURABLE", ["PublishedButNotDurable", "DataLoss"]),
        ("UNAVAILABLE", "STOPPING", ["Unavailable"]),
        ("CANCELLED", "CANCELLED_BY_CALLER", ["Cancelled"]),
        ("ABORTED", "OF_A_NEWER_DAEMON", ["Aborted"]),
        ("OUT_OF_RANGE", "OF_A_NEWER_DAEMON", ["ConvertError"]),
    ],
)
def test_client_refusal_has_the_class_of_its_reason_or_status(
    kind: str, fake: Fake, status: str, reason: str, kinds: list[str]
) -> None:
    """With its sentence and its values."""
    end = fake.convert(kind, f"refuse:{status}:{reason}")
    assert end["kinds"][: len(kinds)] == kinds
    assert end["reason"] == reason
    assert end["metadata"]["free_bytes"] == "7"
    assert end["message"].startswith("the fake refuses")


@both
@pytest.mark.parametrize("label", ["bare:INTERNAL", "two:INTERNAL:X", "foreign:NOT_FOUND:X"])
def test_status_without_our_errorinfo_is_a_transport_error(
    kind: str, fake: Fake, label: str
) -> None:
    """Whatever its code, the daemon did not say it."""
    end = fake.convert(kind, label)
    assert (end["error"], end["reason"]) == ("OutcomeUnknown", "CONNECTION_LOST")


@both
def test_call_unknown_to_the_daemon_is_unimplemented(kind: str, fake: Fake) -> None:
    """The answer is gRPC's own, and has no ErrorInfo."""
    end = fake.call(kind, "inspect", "/images/bare:UNIMPLEMENTED")
    assert (end["error"], end["reason"]) == ("Unimplemented", "NO_SUCH_METHOD")


# --- a caller that has enough --------------------------------------------------------------------


@both
@pytest.mark.parametrize("label", ["hang", "silent"])
def test_client_timeout_cancels_the_call_at_the_daemon(kind: str, fake: Fake, label: str) -> None:
    """And is told apart from a daemon that is not there."""
    end = fake.convert(kind, label, timeout=3, wait_for_ready=2.5)
    assert (end["error"], end["reason"]) == ("DeadlineExceeded", "TIMEOUT")
    fake.await_noted("ended")


@both
def test_exception_in_on_progress_cancels_the_job_and_is_raised(kind: str, fake: Fake) -> None:
    """The caller sees its own exception."""
    end = fake.convert(kind, "hang", stop_at="converting")
    assert end["error"] == "CallerError"
    fake.await_noted("ended")


def test_cancelled_task_cancels_the_job(fake: Fake) -> None:
    """And leaves the task cancelled."""
    end = fake.convert("aio", "hang", cancel_at="converting")
    assert end["error"] == "CancelledError"
    fake.await_noted("ended")


def test_task_cancelled_while_it_waits_for_a_daemon_stays_cancelled(
    absent: Fake,
) -> None:
    """It is not taken for the call that the client itself calls off."""
    end = absent.convert("aio", cancel_after=0.2, wait_for_ready=10)
    assert end["error"] == "CancelledError"


@both
def test_ctrl_c_cancels_the_job_of_a_client(kind: str, fake: Fake) -> None:
    """It ends the call, and so the job."""
    calling = fake.converting(kind, "hang")
    calling.await_phase("converting")
    calling.process.send_signal(signal.SIGINT)
    assert calling.end()["error"] == "KeyboardInterrupt"
    fake.await_noted("ended")


CUT_SHORT: Final = """
import os, signal, sys
import grpc._channel
import convertd_client

start_waiting = grpc._channel._run_channel_spin_thread

def interrupt(state):
    # gRPC has made the call, and not yet started what waits for its end.
    os.kill(os.getpid(), signal.SIGINT)
    start_waiting(state)

grpc._channel._run_channel_spin_thread = interrupt
try:
    with convertd_client.Client(sys.argv[1], wait_for_ready=60) as client:
        client.access()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_a_call_starts_ends_it(absent: Fake) -> None:
    """grpcio, left there, would wait for ever when the client is closed."""
    argv = [sys.executable, "-c", CUT_SHORT, str(absent.socket)]
    ran = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=waiting.DEADLINE_S / 2
    )
    assert (ran.stdout, ran.stderr) == ("interrupted\n", "")


@both
def test_killed_client_process_cancels_its_job(kind: str, fake: Fake) -> None:
    """Its connection ends with it."""
    calling = fake.converting(kind, "hang")
    calling.await_phase("converting")
    calling.process.kill()
    fake.await_noted("ended")
    with calling.process:
        pass


# --- a request that can't be said ----------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_mode": "unsafe"}, "BAD_OPTION"),
        ({"compression": "lzma"}, "BAD_OPTION"),
        ({"mode": -1}, "BAD_OPTION"),
        ({"label": "\udcff"}, "BAD_OPTION"),
    ],
)
def test_option_the_contract_can_not_represent_is_refused_by_the_client(
    kind: str, fake: Fake, options: dict[str, Any], reason: str
) -> None:
    """With the class and reason that the daemon would have given."""
    end = fake.convert(kind, **options)
    assert (end["error"], end["reason"]) == ("InvalidArgument", reason)
    assert fake.log == []
