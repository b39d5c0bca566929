"""The queue: its order, the positions that callers are sent, and the limits of each user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.agent import Call, conversion
from harness.callers import ALICE, BOB, PYTHON, Caller
from harness.daemon import FRONT, PREFORKED_JOB, Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={
        "jobs": 1,
        "jobs_per_user": 1,
        "queue": 4,
        "queue_per_user": 3,
        "connections": 12,
        "connections_per_user": 6,
    },
    grants=[Grant(users=[1234, 1235], read=[LIBRARY, IMAGES], write=[IMAGES])],
)

MIB: Final = 1024 * 1024


class Queue:
    """Conversions that take a minute each, by name."""

    def __init__(self, daemon: Daemon, library: Path, directory: Path) -> None:
        """Begin with none."""
        self.daemon = daemon
        self.source = library / "bulky.raw"
        self.directory = directory
        self.calls: dict[str, Call] = {}

    def join(self, caller: Caller, name: str) -> Call:
        """Ask for one, and wait until it runs or waits."""
        call = self.ask(caller, name)
        call.await_event(lambda event: bool(event.progress.job_id or event.started.job_id))
        return call

    def ask(self, caller: Caller, name: str) -> Call:
        """Ask for one."""
        request = conversion(
            self.source,
            self.directory / f"{name}.qcow2",
            rate_limit_bytes_per_second=MIB,
            label=name,
        )
        self.calls[name] = self.daemon.agent(caller).convert(request)
        return self.calls[name]

    def running(self) -> list[str]:
        """The names of those that run now."""
        return [job.label for job in self.jobs() if job.state == pb.JOB_STATE_RUNNING]

    def waiting(self) -> list[str]:
        """The names of those that wait, by their positions."""
        queued = [job for job in self.jobs() if job.state == pb.JOB_STATE_QUEUED]
        queued.sort(key=lambda job: job.progress.queue_position)
        assert [job.progress.queue_position for job in queued] == list(range(len(queued)))
        return [job.label for job in queued]

    def jobs(self) -> list[pb.Job]:
        """Everybody's."""
        return [job for caller in (ALICE, BOB) for job in self.daemon.agent(caller).jobs()]

    def end(self, name: str) -> None:
        """Cancel one."""
        call = self.calls.pop(name)
        call.cancel()
        assert call.end().status == "CANCELLED"

    def await_state(self, running: list[str], waiting_in_turn: list[str]) -> None:
        """Wait until exactly these run, and exactly these wait, in this order."""
        waiting.until(lambda: self.running() == running, f"only {running} run")
        waiting.until(
            lambda: {job.label for job in self.jobs()} == {*running, *waiting_in_turn},
            f"{waiting_in_turn} wait",
        )
        assert self.waiting() == waiting_in_turn

    def end_all(self) -> None:
        """Cancel all."""
        for name in tuple(self.calls):
            self.end(name)
        self.daemon.await_idle()


@pytest.fixture
def queue(daemon: Daemon, library: Path, images_dir: Path) -> Queue:
    """Nobody asks for anything yet."""
    return Queue(daemon, library, images_dir)


def test_queue_is_fair_between_users(queue: Queue) -> None:
    """Who asks often waits behind nobody but himself, and is told as he moves."""
    queue.join(ALICE, "a1")
    queue.join(ALICE, "a2")
    queue.join(ALICE, "a3")
    queue.await_state(["a1"], ["a2", "a3"])
    queue.join(BOB, "b1")
    queue.join(BOB, "b2")
    queue.await_state(["a1"], ["a2", "b1", "a3", "b2"])
    served = []
    for _ in range(4):
        (name,) = queue.running()
        served.append(name)
        queue.end(name)
        waiting.until(lambda gone=name: queue.running() not in ([], [gone]), "the next one runs")  # type: ignore[misc]
    served += queue.running()
    assert served == ["a1", "a2", "b1", "a3", "b2"]
    queue.end_all()


def test_queue_positions_move_up_when_a_job_leaves_the_queue(queue: Queue) -> None:
    """By CancelJob, by ending the call: the others are told their new positions."""
    queue.join(ALICE, "a1")
    for name in ("a2", "a3"):
        queue.join(ALICE, name)
    queue.join(BOB, "b1")
    queue.await_state(["a1"], ["a2", "b1", "a3"])
    (job,) = [job for job in queue.jobs() if job.label == "a2"]
    queue.daemon.agent(ALICE).cancel_job(job.job_id)
    refusal = queue.calls.pop("a2").refusal()
    assert (refusal.status, refusal.reason) == ("CANCELLED", "CANCELLED_BY_CALLER")
    queue.await_state(["a1"], ["a3", "b1"])
    queue.end("a3")
    queue.await_state(["a1"], ["b1"])
    queue.end_all()


def test_disconnected_caller_leaves_the_queue(queue: Queue) -> None:
    """Killed, without a word: the connection tells."""
    queue.join(BOB, "b1")
    queue.join(ALICE, "a1")
    queue.join(BOB, "b2")
    queue.daemon.kill_agent(ALICE)
    del queue.calls["a1"]
    queue.await_state(["b1"], ["b2"])
    queue.end_all()


def test_caller_is_sent_each_change_of_its_queue_position(queue: Queue) -> None:
    """0 for the next, as the contract says; then it runs."""
    queue.join(BOB, "b1")
    queue.join(BOB, "b2")
    third = queue.ask(BOB, "b3")
    position = third.await_queued().queue_position
    assert position == 1
    queue.end("b2")
    assert third.await_queued().queue_position == 0
    queue.end("b1")
    started = third.await_started()
    assert started.job_id
    queue.end_all()


def test_full_queue_refuses_one_user_and_all_users_at_their_limits(queue: Queue) -> None:
    """Who is refused is told how many wait, and how many may."""
    for name in ("a1", "a2", "a3", "a4"):
        queue.join(ALICE, name)
    refusal = queue.ask(ALICE, "a5").refusal()
    del queue.calls["a5"]
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert refusal.metadata == {"waiting": "3", "limit": "3", "whom": "uid 1234"}
    queue.join(BOB, "b1")
    refusal = queue.ask(BOB, "b2").refusal()
    del queue.calls["b2"]
    assert refusal.metadata == {"waiting": "4", "limit": "4", "whom": "the daemon"}
    queue.end_all()


def test_requests_other_than_conversions_do_not_wait_in_the_queue(
    queue: Queue, library: Path, images_dir: Path
) -> None:
    """Inspect, a validation, lists and GetAccess are answered with every place taken."""
    queue.join(ALICE, "a1")
    for name in ("b1", "b2", "b3"):
        queue.join(BOB, name)
    agent = queue.daemon.agent(BOB)
    source = library / "small.qcow2"
    inspect = pb.InspectRequest(source=pb.Source(path=str(source)))
    answer = agent.ask("Inspect", inspect, pb.InspectResponse)
    assert (answer.format, answer.virtual_size_bytes) == ("qcow2", 8 * MIB)
    request = conversion(
        source, images_dir / "dest.raw", source_format="", dest_format="raw", validate_only=True
    )
    assert not agent.convert(request).result().published
    assert agent.access().uid == BOB.uid
    queue.await_state(["a1"], ["b1", "b2", "b3"])
    queue.end_all()


def test_user_can_not_take_more_job_slots_than_its_limit(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """A free place is kept for the next user, and given to him at once."""
    daemon = make_daemon(POLICY.with_limits(jobs=2))
    daemon.start()
    queue = Queue(daemon, library, images_dir)
    queue.join(ALICE, "a1")
    queue.join(ALICE, "a2")
    queue.await_state(["a1"], ["a2"])
    queue.join(BOB, "b1")
    queue.await_state(["a1", "b1"], ["a2"])
    queue.end_all()


def test_job_cancelled_during_its_fork_ends_without_the_daemon(queue: Queue) -> None:
    """A forked process has its parent's handlers at first: the daemon must not stop with it."""
    agent = queue.daemon.agent(ALICE)
    for number in range(40):
        calls = [queue.ask(ALICE, f"{kind}{number}") for kind in ("first", "second")]
        calls[0].await_event(lambda event: bool(event.progress.job_id))
        for call in calls:
            call.cancel()
        assert {call.end().status for call in calls} == {"CANCELLED"}
    assert agent.access().uid == ALICE.uid
    queue.daemon.await_idle()


# --- connections --------------------------------------------------------------------------------

CONNECT: Final = """
import json, socket, sys
path, count = sys.argv[1], int(sys.argv[2])
kept = []
for _ in range(count):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    kept.append(sock)
# An HTTP/2 server speaks first; one that does not want us hangs up.
def served(sock):
    try:
        return bool(sock.recv(9))
    except ConnectionResetError:
        return False
print(json.dumps([served(sock) for sock in kept]), flush=True)
if len(sys.argv) > 3:
    sys.stdin.read()
"""


def connect(caller: Caller, daemon: Daemon, count: int) -> list[bool]:
    """Connect so many times at once, and tell which of these were served."""
    ran = caller.run([PYTHON, "-I", "-c", CONNECT, str(daemon.socket), str(count)])
    assert ran.status == 0, ran
    served: list[bool] = json.loads(ran.out)
    return served


CAROL: Final = Caller(uid=1236, gid=1236)
DAVE: Final = Caller(uid=1237, gid=1237)


def test_user_over_the_connection_limit_is_refused_until_one_closes(daemon: Daemon) -> None:
    """The others are closed at once; when the first are gone, there is room again."""
    daemon.await_idle()
    quiet = len(processes.descriptors(daemon.pid))
    for _ in range(3):
        assert connect(CAROL, daemon, 8) == [True] * 6 + [False] * 2
        waiting.until(
            lambda: len(processes.descriptors(daemon.pid)) <= quiet, "the connections are gone"
        )


def test_user_at_the_connection_limit_takes_no_connections_of_other_users(daemon: Daemon) -> None:
    """The bound on all is shared; the bound on each is what keeps one from taking all."""
    argv = [PYTHON, "-I", "-c", CONNECT, str(daemon.socket), "20", "stay"]
    with CAROL.popen(argv, stdin=-1, stdout=-1) as greedy:
        assert greedy.stdout is not None
        assert sum(json.loads(greedy.stdout.readline())) == 6
        assert connect(DAVE, daemon, 1) == [True]
        assert daemon.agent(ALICE).access().uid == ALICE.uid


def test_connections_of_all_users_together_are_limited(daemon: Daemon) -> None:
    """So that descriptors are left for those who are in."""
    argv = [PYTHON, "-I", "-c", CONNECT, str(daemon.socket), "6", "stay"]
    with (
        CAROL.popen(argv, stdin=-1, stdout=-1) as one,
        DAVE.popen(argv, stdin=-1, stdout=-1) as other,
    ):
        assert one.stdout is not None
        assert other.stdout is not None
        served = json.loads(one.stdout.readline()) + json.loads(other.stdout.readline())
        assert sum(served) <= 12
        assert connect(Caller(uid=1238, gid=1238), daemon, 1) == [False]


# --- after many calls ---------------------------------------------------------------------------


def test_many_calls_leak_no_descriptor_process_or_memory(
    daemon: Daemon, library: Path, images_dir: Path
) -> None:
    """200 of all kinds, after some to warm up, with connections that come and go."""
    front = daemon.await_one(FRONT)
    work(daemon, library, images_dir / "first", 10)
    daemon.await_idle()
    before = [state(daemon.pid), state(front)]
    work(daemon, library, images_dir / "second", 50)
    daemon.await_idle()
    most = [descriptors + processes.LAZY_DESCRIPTORS for descriptors, _ in before]
    waiting.until(
        lambda: all(
            state(pid)[0] <= bound for pid, bound in zip((daemon.pid, front), most, strict=True)
        ),
        "as many descriptors as before",
    )
    ahead = daemon.await_one(PREFORKED_JOB)
    assert {one.pid for one in processes.of_session(daemon.pid)} == {daemon.pid, front, ahead}
    grown = [state(pid)[1] - item[1] for pid, item in zip((daemon.pid, front), before, strict=True)]
    assert grown[0] < 512, "KiB that the broker grew by"
    assert grown[1] < 2048, "KiB that the front grew by"


def state(pid: int) -> tuple[int, int]:
    """How many descriptors and how much memory (KiB) a process has."""
    return len(processes.descriptors(pid)), processes.anonymous_kib(pid)


def work(daemon: Daemon, library: Path, directory: Path, rounds: int) -> None:
    """Make four calls at a time."""
    agent = daemon.agent(ALICE)
    directory.mkdir()
    inspect = pb.InspectRequest(source=pb.Source(path=str(library / "small.qcow2")))
    refused = pb.InspectRequest(source=pb.Source(path="/etc/shadow"))
    validation = conversion(library / "small.raw", directory / "none.qcow2", validate_only=True)
    for number in range(rounds):
        dest = directory / f"{number}.qcow2"
        calls = [
            agent.call("Inspect", inspect),
            agent.call("Inspect", refused),
            agent.convert(validation),
            agent.convert(conversion(library / "small.raw", dest)),
        ]
        expected = ["OK", "PERMISSION_DENIED", "OK", "OK"]
        assert [call.end().status for call in calls] == expected
        dest.unlink()
        if number % 10 == 0:
            connect(CAROL, daemon, 5)
    daemon.await_idle()
