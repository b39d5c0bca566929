"""Whoever attaches a descriptor to what it sends, whose close takes as long as it likes.

Each twice: where the kernel refuses that (SO_PASSRIGHTS), and where it has no such option.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images, processes, waiting
from harness.agent import conversion
from harness.callers import ALICE, BOB, MALLORY
from harness.daemon import FRONT, PREFORKED_JOB, Daemon
from harness.fixtures import FillPolicy, MakeDaemon
from hostile import compromised_front, http2, lingering
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd_core import codec, messages
from convertd_daemon.linux import scm_rights

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])])

CLOSER: Final = "convertd-closer"

REFUSED, UNKNOWN = "the kernel refuses it", "the kernel can't"


@pytest.fixture(scope="module", params=[REFUSED, UNKNOWN])
def kernel(request: pytest.FixtureRequest) -> str:
    """What the daemon finds at its start."""
    found: str = request.param
    return found


def wrapper(kernel: str) -> tuple[str, ...]:
    """What to start a daemon with."""
    return lingering.as_before_6_16() if kernel == UNKNOWN else ()


@pytest.fixture(scope="module")
def attacked(kernel: str, fill_in: FillPolicy) -> Iterator[Daemon]:
    """The module's daemon, on either kernel."""
    one = Daemon(fill_in(POLICY))
    try:
        one.start(wrapper=wrapper(kernel))
        yield one
        one.await_idle()
        one.stop()
    finally:
        one.discard()


@pytest.mark.parametrize(
    "how",
    ["at once", "in the middle", "after a part", "out of band", "and is gone", "over the cap"],
)
def test_descriptors_attached_by_strangers_do_not_block_other_callers(
    attacked: Daemon, kernel: str, how: str
) -> None:
    """Whenever they send it, and whoever would have closed it: others are answered meanwhile.

    In the end nothing of it is left.
    """
    agent = attacked.agent(BOB)
    agent.access()
    before = compromised_front.descriptors_of(attacked.pid)
    in_front = compromised_front.descriptors_of(attacked.await_one(FRONT))
    with lingering.attacking(attacked, how, 20) as attack:
        while not attack.is_heard:
            assert lingering.seconds_of(agent.access) < lingering.SOON_S
        outcomes = attack.outcomes
        assert lingering.seconds_of(agent.access) < lingering.SOON_S
    if kernel != UNKNOWN:
        assert "sent" not in outcomes
    elif how == "over the cap":
        # Each may be ended before it has sent anything.
        assert set(outcomes) <= {"sent", "BrokenPipeError"}
    else:
        assert "sent" in outcomes
    waiting.until(
        lambda: compromised_front.descriptors_of(attacked.pid) <= before,
        "the broker's descriptors close",
    )
    waiting.until(
        lambda: (
            compromised_front.descriptors_of(attacked.await_one(FRONT))
            <= in_front + processes.LAZY_DESCRIPTORS
        ),
        "the front's descriptors close",
    )
    attacked.await_none(CLOSER)
    assert lingering.seconds_of(agent.access) < lingering.SOON_S


def test_descriptors_attached_by_strangers_do_not_block_conversions(
    attacked: Daemon, library: Path, images_dir: Path
) -> None:
    """Each job's process is a copy of the broker, with its descriptors, for a moment."""
    agent, numbers = attacked.agent(ALICE), itertools.count()
    with lingering.attacking(attacked, "and is gone", 40) as attack:
        while not attack.is_heard:
            dest = images_dir / f"dest-{next(numbers)}"
            call = agent.convert(conversion(library / "small.raw", dest))
            assert lingering.seconds_of(call.result) < lingering.SOON_S
    attacked.await_idle()


def test_front_that_dies_with_unread_descriptors_does_not_block_the_broker(
    attacked: Daemon,
) -> None:
    """The broker closes then what the front did not read, and starts another front."""
    pid = attacked.await_one(FRONT)
    os.kill(pid, signal.SIGSTOP)
    with lingering.attacking(attacked, "and does not wait", 6) as attack:
        outcomes = attack.outcomes
        # The broker has taken them all in when it has one that came after them.
        accepted = compromised_front.descriptors_of(attacked.pid)
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(attacked.socket))
            waiting.until(
                lambda: compromised_front.descriptors_of(attacked.pid) > accepted, "it is accepted"
            )
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        attacked.await_notice("READY=1")
        # To start a front takes a while itself, on a busy machine; one close would take longer.
        assert time.monotonic() - began < lingering.LINGER_S
    assert len(outcomes) == 6
    assert attacked.agent(BOB).access().uid == BOB.uid


ACTIVATE: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="convertd.socket")
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_descriptors_sent_before_the_daemon_started_do_not_block_it(
    make_daemon: MakeDaemon, kernel: str
) -> None:
    """Systemd listens before, and no option was set on its socket then."""
    daemon = make_daemon(POLICY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemon.socket))
        daemon.socket.chmod(0o666)
        listening.listen()
        with lingering.attacking(daemon, "and does not wait", 3) as attack:
            assert attack.outcomes == ["sent"] * 3
            activated = (sys.executable, "-c", ACTIVATE, str(listening.fileno()))
            daemon.start(wrapper=(*wrapper(kernel), *activated), pass_fds=(listening.fileno(),))
            agent = daemon.agent(BOB)
            assert lingering.seconds_of(agent.access) < lingering.SOON_S
            daemon.await_idle()
            daemon.signal(signal.SIGTERM)
            assert lingering.seconds_of(daemon.wait) < lingering.SOON_S
    daemon.socket.unlink()


def test_descriptors_in_the_backlog_do_not_delay_the_stop(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """They are in the backlog when the daemon stops listening, and waits for its last job."""
    daemon = make_daemon(POLICY.with_limits(jobs=1))
    daemon.start(wrapper=lingering.as_before_6_16())
    agent = daemon.agent(ALICE)
    slow = conversion(
        library / "bulky.raw", images_dir / "slow", rate_limit_bytes_per_second=images.MIB
    )
    call = agent.convert(slow)
    call.await_started()
    # Its end would be a signal to the broker, which ends a close that lingers.
    daemon.await_none(PREFORKED_JOB)
    os.kill(daemon.pid, signal.SIGSTOP)
    with lingering.attacking(daemon, "and does not wait", 20) as attack:
        assert attack.outcomes == ["sent"] * 20
        daemon.signal(signal.SIGTERM)
        os.kill(daemon.pid, signal.SIGCONT)
        assert lingering.seconds_of(lambda: daemon.await_logged("stopping")) < lingering.SOON_S
        assert lingering.seconds_of(agent.jobs) < lingering.SOON_S
        call.cancel()
        call.end()
        assert lingering.seconds_of(daemon.wait) < lingering.SOON_S
    daemon.check_nothing_is_left()


def test_broker_takes_no_descriptor_from_a_compromised_front(
    make_daemon: MakeDaemon, kernel: str
) -> None:
    """It takes no descriptor from it at all: such a front is replaced, and nobody waits."""
    daemon = make_daemon(POLICY)
    home = daemon.home / "front"
    home.mkdir()
    message = codec.encode(messages.Request(call=1, connection=2**40, body=messages.ListJobs()))
    with compromised_front.started(daemon, home, *wrapper(kernel)) as front:
        before = compromised_front.descriptors_of(daemon.pid)
        sock, others = lingering.lingering()
        if kernel == REFUSED:
            with pytest.raises(PermissionError):
                front.channel.sock.sendmsg([message], lingering.attached(sock))
        else:
            first = daemon.await_one(FRONT)
            with contextlib.suppress(BrokenPipeError):  # the broker may have ended it after one
                for _ in range(3):
                    front.channel.sock.sendmsg([message], lingering.attached(sock))
            sock.close()
            began = time.monotonic()
            waiting.until(lambda: not processes.exists(first), "the front is killed")
            front.take_over_next(daemon)
            assert front.quiet()
            assert time.monotonic() - began < lingering.LINGER_S
        assert front.quiet()
        waiting.until(
            lambda: front.quiet() and compromised_front.descriptors_of(daemon.pid) <= before,
            "the broker's descriptors close",
        )
        for one in (*others, sock):  # its own end gone first, nothing lingers
            one.close()


def test_connection_with_attached_descriptors_counts_until_it_is_closed(
    make_daemon: MakeDaemon,
) -> None:
    """Where the front does not say that it let go, the broker keeps its own, within the caps."""
    daemon = make_daemon(POLICY.with_limits(connections_per_user=3))
    home = daemon.home / "front"
    home.mkdir()
    with compromised_front.started(daemon, home, *lingering.as_before_6_16()) as front:
        numbers = []
        with lingering.attacking(daemon, "at once", 3):
            for _ in range(3):
                message, held = front.await_message(messages.Connected)
                with socket.socket(fileno=held[0]) as sock:
                    waiting.until(lambda: not scm_rights.holds_none(sock), "it is sent")
                numbers.append(message.connection)
        with http2.connected(daemon.socket, MALLORY) as sock:
            assert sock.recv(1) == b""
        assert f"too many connections uid={MALLORY.uid} own=3" in daemon.log
        for number in numbers:
            front.channel.send(messages.Released(connection=number))
        assert front.quiet()
        with compromised_front.connected(daemon, MALLORY):
            message, held = front.await_message(messages.Connected)
            scm_rights.close_all(held)
            assert message.uid == MALLORY.uid


IN_FLIGHT: Final = 2000
MAY_BE_OPEN: Final = 500


def test_too_many_descriptors_in_flight_do_not_stop_the_daemon(make_daemon: MakeDaemon) -> None:
    """The kernel counts all of root's, of whoever is root in a container too, and then refuses."""
    daemon = make_daemon(POLICY)
    daemon.start()
    agent = daemon.agent(BOB)
    agent.access()
    with contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(sock) for sock in socket.socketpair())
        rights = lingering.attached(here)
        rights[0][2].extend([here.fileno()] * 249)
        for _ in range(IN_FLIGHT // 250):
            there.sendmsg([b"x"], rights)
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (MAY_BE_OPEN, hard))
        with http2.connected(daemon.socket, MALLORY) as sock:
            assert sock.recv(1) == b""
        assert agent.access().uid == BOB.uid
    assert daemon.agent(ALICE).access().uid == ALICE.uid
