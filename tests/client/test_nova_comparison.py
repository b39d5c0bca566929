"""nova.convert_image beside Nova 34's own function: the same image, in the same cache mode.

Nova is the real one, from PyPI, in an environment of its own; only its qemu-img is wrapped, by a
script that notes the arguments and executes the real one.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import encrypting
import pytest
from harness.callers import ALICE, PYTHON
from harness.daemon import Daemon
from policies import Grant, Policy, Root

from convertd_daemon.job import small_copy

ROOT: Final = Path(__file__).parents[2]
NOVA: Final = ROOT / "build/nova/bin/python"
DRIVE: Final = ROOT / "tests/nova/drive.py"

IMAGES: Final = Root("images", "{scratch}/images", mounts=True)
POLICY: Final = Policy(
    grants=[
        Grant(
            read=[IMAGES], write=[IMAGES], formats=["raw", "qcow2", "vmdk", "luks"], overwrite="any"
        )
    ]
)

OURS: Final = """
import json, sys
from convertd_client import nova
for name, arguments in json.load(sys.stdin):
    print(json.dumps(getattr(nova, name)(*arguments).dest_cache.mode))
"""

SECRET: Final = {"secret": "correct horse", "format": "luks"}
FULL: Final = os.environ.get("CONVERTD_TEST_NOVA_MATRIX") == "full"
COMPRESSED: Final = frozenset({"qcow2", "vmdk"})
PLAIN: Final = ("raw", "qcow2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One conversion of the matrix."""

    source: str
    source_encrypted: bool
    dest: str
    dest_encrypted: bool
    compress: bool
    directory: str

    @property
    def name(self) -> str:
        """A name for its files."""
        ends = (self.source, self.source_encrypted, self.dest, self.dest_encrypted)
        return "-".join(map(str, (*ends, self.compress)))

    def arguments(self, home: Path, dest: str) -> list[Any]:
        """The arguments of convert_image."""
        directory = home / self.directory
        return [
            str(home / f"source-{self.source}-{self.source_encrypted}"),
            str(directory / f"{dest}-{self.name}"),
            self.source,
            self.dest,
            str(directory),
            self.compress,
            SECRET if self.source_encrypted else None,
            SECRET if self.dest_encrypted else None,
        ]


def cases() -> Iterator[Case]:
    """Formats and encryption of both ends, compressed or not, with and without direct I/O.

    Without what qemu-img itself refuses: only to qcow2 and vmdk it takes a -c, and to no encrypted
    one. Nova's way of encrypting takes some seconds each time, so of those only one per format is
    tried, with CONVERTD_TEST_NOVA_MATRIX=full all.
    """
    ends = [(name, False) for name in PLAIN] + [("qcow2", True), ("luks", True)]
    to_vmdk = [((source, False), ("vmdk", False)) for source in PLAIN]
    for (source, locked), (dest, sealed) in (*itertools.product(ends, ends), *to_vmdk):
        compressions = (False, True) if dest in COMPRESSED and not sealed else (False,)
        for compress, directory in itertools.product(compressions, ("direct", "ramfs")):
            if FULL or not sealed or (locked and source != dest and directory == "direct"):
                yield Case(
                    source=source,
                    source_encrypted=locked,
                    dest=dest,
                    dest_encrypted=sealed,
                    compress=compress,
                    directory=directory,
                )


@pytest.fixture(scope="module")
def home(daemon: Daemon, scratch: Path, library: Path) -> Iterator[Path]:
    """The sources, a directory that takes direct writes, and one that takes none."""
    assert daemon.is_running
    images_dir = scratch / "images"
    raw = images_dir / "source-raw-False"
    shutil.copy(library / "small.raw", raw)
    with raw.open("ab") as file:  # less would be copied without qemu-img, and without `none`
        file.write(os.urandom(small_copy.MOST_BYTES))
    for image_format, locked in (("qcow2", False), ("qcow2", True), ("luks", True)):
        make_source(images_dir, image_format, locked=locked)
    for name in ("direct", "ramfs"):
        (images_dir / name).mkdir()
    ramfs = str(images_dir / "ramfs")
    subprocess.run(["mount", "-t", "ramfs", "none", ramfs], check=True)
    for path in (images_dir, *images_dir.iterdir()):
        os.chown(path, ALICE.uid, ALICE.gid)
    yield images_dir
    subprocess.run(["umount", ramfs], check=True)


def make_source(home: Path, image_format: str, *, locked: bool) -> None:
    """Make a source from the raw one, with qemu-img itself."""
    prefix = "encrypt." if image_format == "qcow2" else ""
    inside = ["encrypt.format=luks"] if prefix else []
    options = [f"{prefix}key-secret=s", f"{prefix}iter-time=10", *inside] if locked else []
    secret = ["--object", f"secret,id=s,data={SECRET['secret']}"] if locked else []
    argv = ["convert", *secret, "-O", image_format]
    for option in options:
        argv += ["-o", option]
    dest = home / f"source-{image_format}-{locked}"
    encrypting.qemu_img(*argv, home / "source-raw-False", dest)


@pytest.fixture(scope="module")
def theirs(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run Nova's function on all cases; gives its cache modes by the result's path."""
    assert NOVA.exists(), "make peers"
    wrapped = tmp_path_factory.mktemp("wrapped")
    script, noted = wrapped / "qemu-img", wrapped / "noted"
    # Nova does not begin anew where qemu-img could not measure its processor time.
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {noted}\n'
        f'for _ in 1 2 3 4 5 6 7 8 9; do\n  {shutil.which("qemu-img")} "$@" 2>"$0.err" && exit\n'
        f'  status=$?\n  grep -q "{encrypting.NOT_MEASURED}" "$0.err" || break\n'
        f'done\ncat "$0.err" >&2\nexit $status\n'
    )
    script.chmod(0o755)
    subprocess.run(
        [NOVA, "-W", "ignore", DRIVE],
        input=json.dumps([case.arguments(home, "theirs") for case in cases()]),
        env={"PATH": f"{wrapped}:{os.environ['PATH']}", "LC_ALL": "C"},
        text=True,
        check=True,
    )
    ran = [shlex.split(line) for line in noted.read_text().splitlines()]
    return {argv[-1]: argv[argv.index("-t") + 1] for argv in ran}


@pytest.fixture(scope="module", params=["convert_image", "unprivileged_convert_image"])
def ours(request: pytest.FixtureRequest, home: Path, daemon: Daemon) -> dict[str, str]:
    """Run one of our two on all cases, as the user; gives the cache modes by the result's path."""
    calls = [(request.param, case.arguments(home, "ours")) for case in cases()]
    ran = subprocess.run(
        [PYTHON, "-I", "-c", OURS],
        input=json.dumps(calls),
        env={"CONVERTD_SOCKET": str(daemon.socket)},
        user=ALICE.uid,
        group=ALICE.gid,
        extra_groups=[],
        text=True,
        check=True,
        stdout=subprocess.PIPE,
    )
    modes = [json.loads(line) for line in ran.stdout.splitlines()]
    return {call[1][1]: mode for call, mode in zip(calls, modes, strict=True)}


def test_nova_results_and_cache_modes_equal_those_of_nova_34(
    home: Path, theirs: dict[str, str], ours: dict[str, str]
) -> None:
    """A guest sees the same disk, and the host the same way of writing it."""
    for case in cases():
        nova, convertd = (case.arguments(home, side)[1] for side in ("theirs", "ours"))
        assert same_image(case, nova, convertd), case
        assert theirs[nova] == ours[convertd], case
        assert ours[convertd] == ("none" if case.directory == "direct" else "writeback"), case


def same_image(case: Case, one: str, other: str) -> bool:
    """What qemu-img compare says; both are opened with the passphrase where there is one."""
    if not case.dest_encrypted:
        argv = ["qemu-img", "compare", "-f", case.dest, "-F", case.dest, one, other]
        return subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode == 0
    secret = f"secret,id=s,data={SECRET['secret']}"
    key = "encrypt.key-secret" if case.dest == "qcow2" else "key-secret"
    images = [f"driver={case.dest},file.filename={path},{key}=s" for path in (one, other)]
    argv = ["qemu-img", "compare", "--object", secret, "--image-opts", *images]
    return subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode == 0
