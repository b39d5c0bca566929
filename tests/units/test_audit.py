"""The audit record, read back from a real journal by systemd's own reader."""

from __future__ import annotations

import json
from typing import Any

import booted
import pytest

ALICE = 1234
IMAGES = "/srv/images"

READER = """
import json, sys
from systemd import journal

reader = journal.Reader()
for match in sys.argv[1:]:
    reader.add_match(match)
print(json.dumps([{key: str(value) for key, value in entry.items()} for entry in reader]))
"""


@pytest.fixture
def images(machine: booted.Machine) -> booted.Machine:
    """The machine with a root of images that Alice may use, and the service allowed to write it."""
    machine.grant(IMAGES, ALICE)
    return machine


def records(machine: booted.Machine, *matches: str) -> list[dict[str, Any]]:
    """The records that match, as systemd.journal.Reader gives them."""
    machine.run("journalctl", "--sync")
    python = "/usr/local/lib/convertd/bin/python3"
    found: list[dict[str, Any]] = json.loads(machine.output_of(python, "-c", READER, *matches))
    return found


def test_conversion_writes_one_journal_record_with_all_fields(images: booted.Machine) -> None:
    """Who, what, by which rule, how, and how it ended."""
    source, dest = f"{IMAGES}/a.raw", f"{IMAGES}/a.qcow2"
    images.run("qemu-img", "create", "-q", "-f", "raw", source, "8M")
    images.run(
        *("systemd-run", "--quiet", "--wait", "--unit=builder.service", f"--uid={ALICE}"),
        *("convertctl", "convert", source, dest, "-O", "qcow2", "-q"),
    )
    (record,) = booted.wait_for(lambda: records(images, f"CONVERTD_DEST={dest}"), "it")
    assert len(record.pop("CONVERTD_JOB")) == 12
    assert int(record["CONVERTD_PID"]) > 1
    assert 0 < float(record["CONVERTD_SECONDS"]) < 60
    assert 0 <= float(record["CONVERTD_QUEUED_SECONDS"]) < 60
    assert 0 < int(record["CONVERTD_ALLOCATED_BYTES"]) < 2**23
    # Whether a file that was just made is read from memory is for the kernel to say.
    assert record["CONVERTD_SOURCE_CACHE"] in {"none", "writeback"}
    expected = {
        "MESSAGE_ID": "afb2615e-d378-49b7-8e0a-ac97a9567cfa",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "convertd",
        "_SYSTEMD_UNIT": "convertd.service",
        "CONVERTD_OPERATION": "convert",
        "CONVERTD_OUTCOME": "done",
        "CONVERTD_DECISION": "granted",
        "CONVERTD_RULE": "grants[0]",
        "CONVERTD_UID": str(ALICE),
        "CONVERTD_GID": str(ALICE),
        "CONVERTD_COMM": "convertctl",
        "CONVERTD_UNIT": "builder.service",
        "CONVERTD_SOURCE": source,
        "CONVERTD_SOURCE_FORMAT": "raw",
        "CONVERTD_DEST": dest,
        "CONVERTD_DEST_FORMAT": "qcow2",
        "CONVERTD_DEST_CACHE": "writeback",
        "CONVERTD_BYTES": str(2**23),
    }
    assert {key: record.get(key) for key in expected} == expected


def test_refusal_writes_one_journal_record(images: booted.Machine) -> None:
    """Refused requests are those that somebody will ask about."""
    images.run("convertctl", "info", "/etc/shadow", uid=ALICE, check=False)
    (record,) = records(images, "CONVERTD_SOURCE=/etc/shadow")
    assert record["CONVERTD_DECISION"] == "refused"
    assert record["CONVERTD_REASON"] == "PERMISSION_DENIED"
    assert record["CONVERTD_UID"] == str(ALICE)
    assert "CONVERTD_RULE" not in record


def test_failure_writes_one_journal_record_with_its_reason(images: booted.Machine) -> None:
    """Allowed, and not done."""
    images.run("convertctl", "info", f"{IMAGES}/absent", uid=ALICE, check=False)
    # The caller may know before the job's process is gone, and so before the record is written.
    (record,) = booted.wait_for(
        lambda: records(images, f"CONVERTD_SOURCE={IMAGES}/absent"), "the record"
    )
    assert record["CONVERTD_OUTCOME"] == "failed"
    assert record["CONVERTD_REASON"] == "SOURCE_NOT_FOUND"
    assert record["CONVERTD_RULE"] == "grants[0]"


def test_file_name_with_newlines_can_not_forge_journal_fields_or_records(
    images: booted.Machine,
) -> None:
    """A value is sent with its length; the message's line has it escaped."""
    forged = "/x\nCONVERTD_UID=0\nMESSAGE=all is well\n\nCONVERTD_FORGED=1\x1b[2J\u202egpj"
    images.run("convertctl", "info", forged, uid=ALICE, check=False)
    (record,) = records(images, f"CONVERTD_SOURCE={forged}")
    assert record["CONVERTD_UID"] == str(ALICE)
    assert record["MESSAGE"].isprintable()
    assert records(images, "CONVERTD_FORGED=1") == []
    assert records(images, "MESSAGE=all is well") == []


def test_journal_catalog_explains_a_record(images: booted.Machine) -> None:
    """`journalctl -x` tells a newcomer what a record means."""
    images.run("convertctl", "info", "/etc/gshadow", uid=ALICE, check=False)
    images.run("journalctl", "--sync")
    output = images.output_of("journalctl", "-x", "--no-pager", "CONVERTD_SOURCE=/etc/gshadow")
    assert "Subject: A request to convertd was refused" in output
    assert f"(convertctl) of uid {ALICE} asked convertd to" in output
