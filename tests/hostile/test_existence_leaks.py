"""Nobody learns from an answer whether a file exists that he may not look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from harness.callers import ALICE, BOB, MALLORY, Caller
from harness.daemon import Daemon
from hostile import forged, simple_calls
from hostile.forged import Qcow2
from hostile.secret import Secret
from policies import IMAGES, Grant, Policy, Root

CLOSED: Final = Root("closed", "{scratch}/images/closed")
OWN: Final = Root("own", "{scratch}/own", access="caller")
POLICY: Final = Policy(
    grants=[
        Grant(read=[IMAGES, OWN], write=[IMAGES, OWN], formats=["raw", "qcow2", "vmdk", "qed"]),
        Grant(users=[1235], read=[CLOSED, OWN], write=[CLOSED, OWN]),
    ]
)

FORMATS: Final = ("raw", "qcow2", "vmdk", "")


def outcomes(
    daemon: Daemon, source: Path, dest: Path, stated: str, caller: Caller = ALICE
) -> list[tuple[str, str, str]]:
    """What Convert and Inspect say, without the names of the files asked about."""
    given = (
        simple_calls.convert(daemon, source, dest, stated, caller),
        simple_calls.inspect(daemon, source, stated, caller),
    )
    dest.unlink(missing_ok=True)
    return [
        (one.status, one.reason, one.message.replace(str(source), "…").replace(str(dest), "…"))
        for one in given
    ]


@pytest.mark.parametrize("caller", [ALICE, MALLORY], ids=["granted elsewhere", "not granted"])
@pytest.mark.parametrize("stated", FORMATS)
def test_path_without_a_grant_gets_the_same_refusal_whether_it_exists(
    daemon: Daemon, secret: Secret, images_dir: Path, caller: Caller, stated: str
) -> None:
    """Whether it is there, is not, is below something that is not, or below a file."""
    out = images_dir / "out"
    paths = (
        secret.raw,
        secret.absent / "disk.raw",
        secret.raw / "disk.raw",
        Path("/nowhere/at/all/disk.raw"),
    )
    told = [outcomes(daemon, path, out, stated, caller) for path in paths]
    reasons = {tuple(reason for _, reason, _ in one) for one in told}
    assert reasons == {("PERMISSION_DENIED", "PERMISSION_DENIED")}
    as_dest = [simple_calls.overwrite(daemon, images_dir / "in", path).reason for path in paths]
    assert set(as_dest) == {"PERMISSION_DENIED"}


def backing(name: str) -> bytes:
    """A qcow2 on top of it."""
    return Qcow2(backing=name, backing_format="raw").data()


def data_file(name: str) -> bytes:
    """A qcow2 with its data in it."""
    return Qcow2(data_file=name).data()


NAMING: Final[dict[str, Callable[[str], bytes]]] = {
    "backing file": backing,
    "data file": data_file,
    "extent": forged.flat_vmdk,
    "extent, in a sparse file": lambda name: forged.sparse_vmdk_with(forged.flat_vmdk(name)),
}


@pytest.mark.parametrize("make", NAMING.values(), ids=tuple(NAMING))
@pytest.mark.parametrize("stated", FORMATS)
def test_image_gets_the_same_refusal_whatever_its_backing_path_is(
    daemon: Daemon, secret: Secret, images_dir: Path, make: Callable[[str], bytes], stated: str
) -> None:
    """A file, a directory, nothing, a name below a file ("Not a directory"), one of a root's end.

    What the kernel says of each is another errno, and qemu-img prints it.
    """
    closed = images_dir.parent / "closed"
    (closed / "disk.raw").write_bytes(b"x")
    names = (
        *(str(secret.raw), str(secret.directory), f"{secret.raw}/x", f"{secret.absent}/x"),
        *("/nowhere/x", "/etc/shadow", "/etc/shadow/x", "/" + "n" * 200, "/dev/null/x"),
        *(str(closed / "disk.raw"), str(closed / "absent.raw"), f"{closed}/disk.raw/x"),
        "../../secret/disk.raw",
    )
    told = set()
    for name in names:
        image = simple_calls.file_of(ALICE, images_dir / "image", make(name))
        answered = outcomes(daemon, image, images_dir / "out", stated)
        told.add(tuple((s, r, m.replace(name, "…")) for s, r, m in answered))
    assert len(told) == 1, told


def test_symlink_gets_the_same_refusal_wherever_it_leads(
    daemon: Daemon, secret: Secret, images_dir: Path
) -> None:
    """As a source, as a destination, and on the way to either."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    simple_calls.file_of(ALICE, images_dir / "in", b"x" * 512)
    link = images_dir / "link"
    told = set()
    for target in (secret.raw, secret.absent / "disk.raw", secret.directory):
        link.symlink_to(target)
        told.add(
            (
                simple_calls.convert(daemon, link, images_dir / "out", "raw").reason,
                simple_calls.convert(daemon, link / "disk.raw", images_dir / "out", "raw").reason,
                simple_calls.overwrite(daemon, images_dir / "in", link).reason,
                simple_calls.overwrite(daemon, images_dir / "in", link / "disk.raw").reason,
            )
        )
        link.unlink()
    assert told == {("SYMLINK_IN_PATH",) * 4}


def test_names_in_a_directory_the_caller_may_not_search_are_not_revealed(
    daemon: Daemon, scratch: Path
) -> None:
    """Where the caller's own rights count, the daemon's do not look for him."""
    own = scratch / "own"
    own.chmod(0o1777)
    simple_calls.file_of(ALICE, own / "in", b"x" * 512)
    theirs = own / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, BOB.uid, BOB.gid)
    simple_calls.file_of(BOB, theirs / "there", b"x" * 512)
    told = {
        (
            *outcomes(daemon, theirs / name, own / "out", "raw"),
            simple_calls.overwrite(daemon, own / "in", theirs / name).reason,
            simple_calls.convert(daemon, own / "in", theirs / name, "raw").reason,
        )
        for name in ("there", "not-there")
    }
    ((*_, overwriting, creating),) = told
    assert overwriting == creating == "ACCESS_REFUSED"
    assert os.listdir(theirs) == ["there"]
