"""Which formats GetAccess tells: those of ours that the installed qemu-img knows too."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest
from harness.callers import ALICE
from harness.daemon import Daemon, DidNotStart
from harness.fixtures import MakeDaemon
from policies import Policy

from convertd_core import values

POLICY: Final = Policy(qemu_img="{scratch}/qemu-img")
QEMU_IMG: Final = Path("/usr/bin/qemu-img")


def started(make_daemon: MakeDaemon, scratch: Path, word: bytes, other: bytes) -> Daemon:
    """A daemon with a qemu-img in which one word is another, wherever it has it."""
    assert len(word) == len(other)
    program = scratch / "qemu-img"
    data = QEMU_IMG.read_bytes()
    assert word in data
    program.write_bytes(data.replace(word, other))
    program.chmod(0o755)
    daemon = make_daemon(POLICY)
    daemon.start(options=())
    return daemon


def test_get_access_lists_all_formats_that_qemu_img_has(make_daemon: MakeDaemon) -> None:
    """The system's own."""
    daemon = make_daemon(Policy())
    daemon.start()
    helped = subprocess.run([QEMU_IMG, "--help"], check=True, capture_output=True, text=True)
    (line,) = (line for line in helped.stdout.splitlines() if line.startswith("Supported formats:"))
    told = daemon.agent(ALICE).access()
    assert set(told.source_formats) == values.FORMATS & set(line.split())
    assert set(told.dest_formats) == values.WRITABLE_FORMATS & set(line.split())
    assert told.versions.qemu_img in helped.stdout.splitlines()[0]


def test_get_access_omits_a_format_that_qemu_img_lacks(
    make_daemon: MakeDaemon, scratch: Path
) -> None:
    """A distribution may leave some out: here its driver has a name that we don't know."""
    daemon = started(make_daemon, scratch, b"\0parallels\0", b"\0parallelx\0")
    told = daemon.agent(ALICE).access()
    assert set(told.source_formats) == values.FORMATS - {"parallels"}
    assert set(told.dest_formats) == values.WRITABLE_FORMATS - {"parallels"}


def test_qemu_img_that_lists_no_formats_fails_the_self_test(
    make_daemon: MakeDaemon, scratch: Path
) -> None:
    """What it can do would be a guess."""
    with pytest.raises(DidNotStart) as refused:
        started(make_daemon, scratch, b"Supported formats:", b"Supported drivers:")
    assert refused.value.output == (
        "convertd: the self-test failed: conversion is not supported: "
        "qemu-img --help lists no format that convertd knows\n"
    )
