"""Passphrases: from the job's channel to a pipe, and nowhere else."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import channels
import pytest
import refusals
import whole_job
from children import errno_of, in_child
from descriptors import none_left_open

from convertd_core import messages, validation
from convertd_daemon import channel
from convertd_daemon.job import secrets

WORKER = whole_job.WORKER


Pair = tuple[channel.Channel, channel.Channel]


@pytest.fixture
def ends() -> Iterator[Pair]:
    """The front's end of a job's channel, and the job's."""
    here, there = channel.Channel.pair()
    with here, there:
        yield here, there


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    """See that every pipe is closed in the end, also those that are refused."""
    with none_left_open():
        yield


class TestReceivingPassphrases:
    """What the front sends when the job has started."""

    @pytest.mark.parametrize(
        ("source", "dest", "expected"),
        [
            (b"", b"", secrets.Secrets()),
            (b"s", b"", secrets.Secrets(source=b"s")),
            (b"", b"d", secrets.Secrets(dest=b"d")),
            (
                b"s",
                b"d" * validation.MAX_PASSPHRASE_BYTES,
                secrets.Secrets(source=b"s", dest=b"d" * 4096),
            ),
        ],
    )
    def test_source_and_destination_get_their_own_passphrase(
        self, ends: Pair, source: bytes, dest: bytes, expected: secrets.Secrets
    ) -> None:
        """In the order of the request; any bytes are fine."""
        fronts, jobs = ends
        for secret in filter(None, (source, dest)):
            fronts.send_bytes(messages.PASSPHRASE + secret)
        assert secrets.take(jobs, source=bool(source), dest=bool(dest)) == expected

    @pytest.mark.parametrize(
        "data", [b"", b"x" * (validation.MAX_PASSPHRASE_BYTES + 1)], ids=["empty", "long"]
    )
    def test_invalid_passphrase_is_refused_and_not_repeated(self, ends: Pair, data: bytes) -> None:
        """With the field, and the bounds."""
        ends[0].send_bytes(messages.PASSPHRASE + data)
        failure = refusals.refusal_of(lambda: secrets.take(ends[1], source=False, dest=True))
        assert failure is not None
        assert failure.message == "dest.encryption.passphrase: must have 1 to 4096 bytes"

    @pytest.mark.parametrize(
        "data",
        [b"s", b'["Ready",{}]', messages.PASSPHRASE + b"x" * 9000],
        ids=["short", "a-message", "long"],
    )
    def test_message_that_is_not_a_passphrase_is_refused(self, ends: Pair, data: bytes) -> None:
        """Whoever took the front over can send anything."""
        ends[0].send_bytes(data)
        reason = refusals.reason_of(lambda: secrets.take(ends[1], source=True, dest=False))
        assert reason == "BAD_MESSAGE"

    def test_passphrase_with_a_descriptor_is_refused_without_receiving_it(self) -> None:
        """To close it could take for ever."""
        fronts, jobs = channels.passing()
        with fronts, jobs:
            fronts.send_bytes(messages.PASSPHRASE + b"s", 0)
            reason = refusals.reason_of(lambda: secrets.take(jobs, source=True, dest=False))
            assert reason == "BAD_MESSAGE"

    def test_missing_passphrase_ends_in_a_timeout(
        self, ends: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A front that was taken over could hold the job for ever."""
        monkeypatch.setattr(secrets, "LIMIT_S", 0.01)
        reason = refusals.reason_of(lambda: secrets.take(ends[1], source=True, dest=False))
        assert reason == "BAD_MESSAGE"

    def test_disconnected_front_ends_the_wait_for_a_passphrase(self, ends: Pair) -> None:
        """Nobody waits for the result any more."""
        ends[0].close()
        with pytest.raises(channel.Closed):
            secrets.take(ends[1], source=True, dest=False)

    def test_passphrases_are_not_in_repr_or_traceback(self) -> None:
        """Not in a traceback either."""
        kept = secrets.Secrets(source=b"hunter2", dest=b"hunter2")
        assert "hunter2" not in repr(kept)
        assert "hunter2" not in str(dataclasses.replace(kept))


class TestPassphrasePipes:
    """What qemu-img reads them from."""

    def test_each_passphrase_is_on_a_new_pipe_that_is_read_once(self) -> None:
        """By the id of its `secret` object; nothing is offered where there is none."""
        kept = secrets.Secrets(source=b"s" * validation.MAX_PASSPHRASE_BYTES)
        with secrets.as_pipes(kept, WORKER) as pipes:
            assert list(pipes) == ["source"]
            assert len(os.read(pipes["source"], 9999)) == validation.MAX_PASSPHRASE_BYTES
            assert os.read(pipes["source"], 9999) == b""
        with secrets.as_pipes(secrets.Secrets(), WORKER) as pipes:
            assert pipes == {}

    def test_passphrases_can_be_provided_again(self) -> None:
        """To convert, and to compare."""
        kept = secrets.Secrets(source=b"s", dest=b"d")
        for _ in range(2):
            with secrets.as_pipes(kept, None) as pipes:
                assert [os.read(pipes[name], 9) for name in ("source", "dest")] == [b"s", b"d"]

    def test_passphrase_pipe_can_be_opened_by_the_worker_only(self) -> None:
        """Through /proc/self/fd, which asks for the inode's permissions."""
        with secrets.as_pipes(secrets.Secrets(dest=b"d"), WORKER) as pipes:
            path = f"/proc/self/fd/{pipes['dest']}"

            def opened_as(uid: int) -> str:
                def act() -> str:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                    return errno_of(lambda: os.open(path, os.O_RDONLY | os.O_NONBLOCK))

                return in_child(act)

            assert opened_as(WORKER.uid) == "done"
            assert opened_as(1666) == "EACCES"

    def test_unread_passphrase_is_gone_with_its_pipe(self) -> None:
        """A qemu-img that fails before it reads leaves nothing."""
        with secrets.as_pipes(secrets.Secrets(source=b"s"), WORKER) as pipes:
            descriptor = pipes["source"]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
