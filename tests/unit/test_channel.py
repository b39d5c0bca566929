"""The channel between two processes: whole messages, descriptors, and the other end's death."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator

import channels
import pytest
from descriptors import none_left_open

from convertd_core import codec, conditions, messages, values
from convertd_daemon import channel
from convertd_daemon.linux import scm_rights

Pair = tuple[channel.Channel, channel.Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends of a channel."""
    here, there = channels.passing()
    with here, there:
        yield here, there


def test_messages_arrive_unchanged_one_at_a_time(pair: Pair) -> None:
    """And one at a time, however many were sent."""
    here, there = pair
    for number in (1, 2):
        assert here.send(messages.Connected(connection=number, uid=1234))
    for number in (1, 2):
        message, descriptors = there.receive(*messages.FROM_BROKER, most_descriptors=1)
        assert (message, descriptors) == (messages.Connected(connection=number, uid=1234), [])


def test_channel_ends_are_closed_on_exec(pair: Pair) -> None:
    """A qemu-img that had one could end its job, or speak for it."""
    assert not any(os.get_inheritable(end.fileno()) for end in pair)


def test_received_descriptors_are_copies_closed_on_exec(pair: Pair) -> None:
    """The sender's own may be closed at once."""
    here, there = pair
    reader, writer = os.pipe()
    here.send(messages.CallAbandoned(call=1), reader, writer)
    os.close(reader)
    os.close(writer)
    _, (reader, writer) = there.receive(messages.CallAbandoned, most_descriptors=2)
    assert not os.get_inheritable(reader)
    os.write(writer, b"x")
    assert os.read(reader, 2) == b"x"
    scm_rights.close_all([reader, writer])


def test_nonblocking_receive_raises_when_no_message_is_there(pair: Pair) -> None:
    """BlockingIOError, as the socket itself says it."""
    with pytest.raises(BlockingIOError):
        pair[0].receive(messages.CallAbandoned, wait=False)


def test_nonblocking_send_returns_false_when_the_channel_is_full(pair: Pair) -> None:
    """False, nothing is sent, and there is room again when the other end has read."""
    here, there = pair
    sent = 0
    while here.send(messages.CallAbandoned(call=sent), wait=False):
        sent += 1
    assert sent > 10
    for number in range(sent):
        assert there.receive(messages.CallAbandoned, wait=False)[0] == messages.CallAbandoned(
            call=number
        )
    assert here.send(messages.CallAbandoned(call=0), wait=False)


def test_send_to_a_dead_peer_raises(pair: Pair) -> None:
    """By an exception, not by a signal."""
    here, there = pair
    there.close()
    with pytest.raises(channel.Closed):
        here.send(messages.CallAbandoned(call=1))


def test_death_of_the_peer_is_reported_after_its_last_message(pair: Pair) -> None:
    """What was sent before it died is not lost."""
    here, there = pair
    here.send(messages.CallAbandoned(call=1))
    here.close()
    assert there.receive(messages.CallAbandoned)[0] == messages.CallAbandoned(call=1)
    with pytest.raises(channel.Closed):
        there.receive(messages.CallAbandoned)


def test_peer_that_dies_with_unread_messages_is_reported_as_closed(pair: Pair) -> None:
    """The kernel says ECONNRESET then."""
    here, there = pair
    here.send(messages.CallAbandoned(call=1))
    there.close()
    with pytest.raises(channel.Closed):
        here.receive(messages.CallAbandoned)


def test_invalid_message_is_refused_and_its_descriptors_closed(pair: Pair) -> None:
    """Whoever sends one can't fill our table of descriptors."""
    here, there = pair
    here.send_bytes(b"not a message", here.fileno(), here.fileno())
    with none_left_open(), pytest.raises(codec.CodecError):
        there.receive(*messages.FROM_FRONT, most_descriptors=2)


def test_oversized_message_is_refused_and_its_descriptors_closed(pair: Pair) -> None:
    """It is not taken for its first part."""
    here, there = pair
    here.send_bytes(b" " * (channel.MAX_MESSAGE_BYTES + 1), here.fileno())
    with none_left_open(), pytest.raises(codec.CodecError, match="too long"):
        there.receive(*messages.FROM_FRONT, most_descriptors=2)


def test_unexpected_descriptor_is_never_received(pair: Pair) -> None:
    """Nor the message, nor what comes after it: to close what is attached could take for ever."""
    here, there = pair
    here.send(messages.Ready())
    here.send(messages.Ready(), here.fileno())
    here.send(messages.Ready())
    assert there.receive(*messages.FROM_FRONT) == (messages.Ready(), [])
    for wait in (True, False):
        with none_left_open(), pytest.raises(codec.CodecError, match="descriptors"):
            there.receive(*messages.FROM_FRONT, wait=wait)


def test_channel_pair_refuses_descriptors() -> None:
    """The kernel refuses it to who sends, both ways."""
    here, there = channel.Channel.pair()
    with here, there:
        for end in (here, there):
            with pytest.raises(PermissionError):
                end.send(messages.Ready(), end.fileno())


@pytest.mark.parametrize("secret", [b"", b"one", b"x" * 4097])
def test_passphrase_message_arrives_unchanged(pair: Pair, secret: bytes) -> None:
    """An empty one is not the end."""
    here, there = pair
    here.send_bytes(messages.PASSPHRASE + secret)
    assert there.receive_passphrase(4097) == secret


@pytest.mark.parametrize("data", [messages.PASSPHRASE + b"x" * 4098, b"x", b'["Ready",{}]'])
def test_invalid_passphrase_message_is_refused_and_not_repeated(pair: Pair, data: bytes) -> None:
    """Whatever it is."""
    here, there = pair
    here.send_bytes(data)
    with pytest.raises(codec.CodecError) as refused:
        there.receive_passphrase(4097)
    assert data.decode() not in str(refused.value)


def test_message_with_too_many_descriptors_is_refused_and_they_are_closed(pair: Pair) -> None:
    """One is the most that comes along."""
    here, there = pair
    here.send(messages.Ready(), *[here.fileno()] * 20)
    with none_left_open(), pytest.raises(codec.CodecError):
        there.receive(*messages.FROM_FRONT, most_descriptors=1)


def test_ancillary_data_other_than_descriptors_is_ignored(pair: Pair) -> None:
    """Credentials, which a socket that asks for them gets with each message."""
    here, there = pair
    there.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    here.send(messages.Ready())
    assert there.receive(messages.Ready, most_descriptors=4) == (messages.Ready(), [])


def test_closing_a_closed_channel_is_no_error() -> None:
    """Whoever cleans up does not stop half-way."""
    reader, writer = os.pipe()
    os.close(reader)
    scm_rights.close_all([reader, writer])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer)


def test_empty_message_counts_as_a_closed_peer(pair: Pair) -> None:
    """A seqpacket socket does not tell one from the other; nobody of ours sends one."""
    pair[0].sock.sendmsg(
        [b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pair[0].fileno()]))]
    )
    with none_left_open(), pytest.raises(channel.Closed):
        pair[1].receive(messages.CallAbandoned, most_descriptors=1)


def test_longest_request_fits_into_a_message(pair: Pair) -> None:
    """Two paths of 4 KiB, every byte of them one that JSON escapes to six."""
    here, there = pair
    path = "/" + "\x01" * 4094
    request = values.ConvertRequest(
        source=values.Source(path=path), dest=values.Destination(path=path + "x", format="qcow2")
    )
    asked = messages.Request(call=1, connection=1, body=request)
    assert here.send(asked, wait=False)
    assert there.receive(*messages.FROM_FRONT)[0] == asked


def test_failure_with_the_longest_path_fits_into_a_message(pair: Pair) -> None:
    """In message and values."""
    here, there = pair
    failure = conditions.SourceNotFound(path="/" + "\x01" * 4094).failure()
    assert here.send(messages.Failed(failure=failure), wait=False)
    assert there.receive(*messages.FROM_JOB)[0].failure == failure
