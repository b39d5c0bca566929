"""The record of each request where there is no journal: one line on standard error, escaped."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import waiting
from harness.agent import conversion
from harness.callers import ALICE, MALLORY, Caller
from harness.daemon import Daemon
from harness.fixtures import FillPolicy
from policies import IMAGES, LIBRARY, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(grants=[Grant(read=[LIBRARY, IMAGES], write=[IMAGES])])

WITHOUT_A_JOURNAL: Final = (
    *("unshare", "--mount", "sh", "-c"),
    'test ! -e /run/systemd/journal || mount -t tmpfs none /run/systemd/journal; exec "$@"',
    "sh",
)


FIELD: Final = re.compile(
    r"""(\w+)=('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\S+)""",
)
"""A name and a value: bare, or quoted as Python quotes."""


@pytest.fixture(scope="module")
def alone(fill_in: FillPolicy) -> Iterator[Daemon]:
    """A daemon that sees no journal, whatever the machine has."""
    with contextlib.ExitStack() as undo:
        one = Daemon(fill_in(POLICY))
        undo.callback(one.discard)
        one.start(wrapper=WITHOUT_A_JOURNAL)
        yield one
        one.await_idle()
        one.stop()


def lines(daemon: Daemon) -> list[str]:
    """What looks like a record to whoever reads line by line."""
    return [line for line in daemon.log.splitlines() if line.startswith("INFO convertd.audit[")]


@contextlib.contextmanager
def one_line(daemon: Daemon) -> Iterator[dict[str, str]]:
    """The fields of the one record that is made in the block; they are there after it."""
    before, fields = len(lines(daemon)), dict[str, str]()
    yield fields
    # It is written after the caller has its answer.
    waiting.until(lambda: len(lines(daemon)) > before, "the record")
    (line,) = lines(daemon)[before:]
    assert line.isprintable()
    fields.update(FIELD.findall(line))


def test_each_request_writes_one_record(alone: Daemon, library: Path, images_dir: Path) -> None:
    """Done, failed, refused: who, what, by which rule, and how it ended."""
    dest = images_dir / "dest.qcow2"
    request = conversion(library / "small.raw", dest, label="nightly")
    with one_line(alone) as done:
        alone.agent(ALICE).convert(request).result()
    expected = {
        "operation": "convert",
        "outcome": "done",
        "rule": "grants[0]",
        "uid": "1234",
        "gid": "1234",
        "label": "nightly",
        "source": str(library / "small.raw"),
        "source_format": "raw",
        "dest": str(dest),
        "dest_format": "qcow2",
        "bytes": str(8 * 1024 * 1024),
        "allocated_bytes": str(dest.stat().st_blocks * 512),
        "method": "copy",
    }
    assert expected.items() <= done.items()
    assert {"pid", "comm", "job", "source_cache", "dest_cache", "seconds"} <= done.keys()
    with one_line(alone) as failed:
        assert alone.agent(ALICE).convert(request).refusal().reason == "DEST_EXISTS"
    assert (failed["outcome"], failed["reason"]) == ("failed", "DEST_EXISTS")
    assert failed["job"] != done["job"]
    with one_line(alone) as refused:
        assert alone.agent(MALLORY).convert(request).refusal().reason == "PERMISSION_DENIED"
    assert (refused["outcome"], refused["reason"]) == ("refused", "PERMISSION_DENIED")
    assert (refused["uid"], refused["source"]) == ("1666", str(library / "small.raw"))
    assert not {"rule", "job"} & refused.keys()


@pytest.mark.parametrize("caller", [ALICE, MALLORY], ids=["granted", "not granted"])
@pytest.mark.parametrize(
    "name",
    [
        "a\nINFO convertd.audit[1] operation=convert outcome=done uid=0",
        "a outcome=done uid=0",
        "a' outcome=done uid=0 '",
        "a\x1b[2K\rINFO",
        "a\u2028\u202eb",
    ],
    ids=["a newline", "blanks", "a quote", "escape sequences", "marks of direction"],
)
def test_file_name_can_not_forge_a_record_or_a_field(
    alone: Daemon, images_dir: Path, caller: Caller, name: str
) -> None:
    """Whatever could break or disguise the line is escaped."""
    path = str(images_dir / name)
    request = pb.InspectRequest(source=pb.Source(path=path))
    with one_line(alone) as record:
        alone.agent(caller).call("Inspect", request).refusal()
    assert record["uid"] == str(caller.uid)
    assert record["outcome"] == ("failed" if caller == ALICE else "refused")
    assert record["source"] == repr(path)
