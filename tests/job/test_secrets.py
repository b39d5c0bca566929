"""Passphrases: from a pipe to a pipe, and nowhere else."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator

import pytest
import refusals
import whole_job
from children import errno_of, in_child
from descriptors import none_left_open

from convertd_daemon.job import secrets

WORKER = whole_job.WORKER


def pipe_with(data: bytes) -> int:
    """A pipe with that in it, whose writer is closed."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """See that every pipe is closed in the end, also those that are refused."""
    with none_left_open():
        yield


class TestTaking:
    """What comes with a grant."""

    @pytest.mark.parametrize(
        ("source", "dest", "expected"),
        [
            (b"", b"", secrets.Secrets()),
            (b"s", b"", secrets.Secrets(source=b"s")),
            (b"", b"d", secrets.Secrets(dest=b"d")),
            (b"s", b"d" * secrets.MAX_BYTES, secrets.Secrets(source=b"s", dest=b"d" * 4096)),
        ],
    )
    def test_each_end_has_its_own(
        self, source: bytes, dest: bytes, expected: secrets.Secrets
    ) -> None:
        """In the order of the request; any bytes are fine."""
        descriptors = tuple(pipe_with(data) for data in (source, dest) if data)
        assert secrets.take(descriptors, source=bool(source), dest=bool(dest)) == expected

    @pytest.mark.parametrize(
        ("count", "source", "dest"),
        [(0, True, False), (1, True, True), (2, True, False), (1, False, False), (3, True, True)],
    )
    def test_one_that_is_missing_or_too_many_is_refused(
        self,
        count: int,
        source: bool,  # noqa: FBT001
        dest: bool,  # noqa: FBT001
    ) -> None:
        """Nobody guesses which is whose."""
        descriptors = tuple(pipe_with(b"x") for _ in range(count))
        reason = refusals.reason_of(lambda: secrets.take(descriptors, source=source, dest=dest))
        assert reason == "BAD_MESSAGE"

    @pytest.mark.parametrize("data", [b"", b"x" * (secrets.MAX_BYTES + 1)], ids=["empty", "long"])
    def test_one_that_is_none_is_refused_and_not_repeated(self, data: bytes) -> None:
        """With the field, and the bounds."""
        failure = refusals.refusal_of(
            lambda: secrets.take((pipe_with(data),), source=False, dest=True)
        )
        assert failure is not None
        assert failure.message == "dest.encryption.passphrase: must have 1 to 4096 bytes"

    def test_one_that_is_not_there_yet_is_not_waited_for(self) -> None:
        """A front that was taken over could hold the job for ever."""
        reader, writer = os.pipe()
        reason = refusals.reason_of(lambda: secrets.take((reader,), source=True, dest=False))
        os.close(writer)
        assert reason == "BAD_MESSAGE"

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: os.open("/etc/shadow", os.O_RDONLY), id="a-file"),
            pytest.param(lambda: os.open("/dev/zero", os.O_RDONLY), id="a-device-without-end"),
            pytest.param(lambda: os.memfd_create("secret"), id="a-memfd"),
            pytest.param(lambda: socket.socket(socket.AF_UNIX).detach(), id="a-socket"),
        ],
    )
    def test_one_that_is_not_on_a_pipe_is_refused(self, make: Callable[[], int]) -> None:
        """Whoever took the front over could have a file of the daemon's read."""
        reason = refusals.reason_of(lambda: secrets.take((make(),), source=True, dest=False))
        assert reason == "BAD_MESSAGE"

    def test_they_are_never_shown(self) -> None:
        """Not in a traceback either."""
        kept = secrets.Secrets(source=b"hunter2", dest=b"hunter2")
        assert "hunter2" not in repr(kept)
        assert "hunter2" not in str(dataclasses.replace(kept))


class TestOffering:
    """What qemu-img reads them from."""

    def test_each_is_on_a_fresh_pipe_that_is_read_once(self) -> None:
        """By the id of its `secret` object; nothing is offered where there is none."""
        kept = secrets.Secrets(source=b"s" * secrets.MAX_BYTES)
        with secrets.offered(kept, WORKER) as pipes:
            assert list(pipes) == ["source"]
            assert len(os.read(pipes["source"], 9999)) == secrets.MAX_BYTES
            assert os.read(pipes["source"], 9999) == b""
        with secrets.offered(secrets.Secrets(), WORKER) as pipes:
            assert pipes == {}

    def test_they_can_be_offered_again(self) -> None:
        """To convert, and to compare."""
        kept = secrets.Secrets(source=b"s", dest=b"d")
        for _ in range(2):
            with secrets.offered(kept, None) as pipes:
                assert [os.read(pipes[name], 9) for name in ("source", "dest")] == [b"s", b"d"]

    def test_only_the_worker_can_open_them(self) -> None:
        """Through /proc/self/fd, which asks for the inode's permissions."""
        with secrets.offered(secrets.Secrets(dest=b"d"), WORKER) as pipes:
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

    def test_one_that_nobody_read_is_gone_with_its_pipe(self) -> None:
        """A qemu-img that fails before it reads leaves nothing."""
        with secrets.offered(secrets.Secrets(source=b"s"), WORKER) as pipes:
            descriptor = pipes["source"]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
