"""Every option of a format is within reach: of convertctl, of both clients, and of `local`."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from harness import images
from harness.callers import ALICE, CONVERTCTL, PYTHON, Ran
from harness.daemon import Daemon
from loop_devices import Devices
from policies import IMAGES, LIBRARY, Grant, Policy, Root

from convertd_core import creation_options

VOLUMES: Final = Root("volumes", "{volumes}", kind="block", allow_is_zero=True)
POLICY: Final = Policy(
    grants=[
        Grant(
            read=[LIBRARY, IMAGES],
            write=[IMAGES, VOLUMES],
            formats=["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels"],
        )
    ]
)

MIB: Final = 1024 * 1024

SCRIPT: Final = """
import asyncio, json, sys
from convertd_client import AsyncClient, Client, ConvertError, local

async def wait(*ends, **options):
    async with AsyncClient() as client:
        return await client.convert(*ends, **options)

way, source, asked = json.load(sys.stdin)
for dest, dest_format, options in asked:
    options |= {"source_format": "raw", "dest_format": dest_format}
    try:
        if way == "Client":
            with Client() as client:
                client.convert(source, dest, **options)
        elif way == "AsyncClient":
            asyncio.run(wait(source, dest, **options))
        else:
            local.convert(source, dest, **options)
    except ConvertError as error:
        print(json.dumps([error.reason, error.metadata["field"]]))
    else:
        print(json.dumps("done"))
"""

WAYS: Final = ("Client", "AsyncClient", "local")


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image."""
    argv = ["qemu-img", "info", "--output=json", str(path)]
    output: dict[str, Any] = json.loads(
        subprocess.run(argv, check=True, capture_output=True).stdout
    )
    return output


def data(key: str) -> Callable[[Path], object]:
    """What qemu-img says of an image that only its format has."""
    return lambda path: info(path)["format-specific"]["data"][key]


def number(offset: int) -> Callable[[Path], object]:
    """A number of four bytes in an image."""
    return lambda path: struct.unpack_from("<I", path.read_bytes(), offset)[0]


def cluster_size(path: Path) -> object:
    """What qemu-img says of an image's clusters."""
    return info(path)["cluster-size"]


def says(text: bytes) -> Callable[[Path], object]:
    """Whether an image's descriptor has this in it."""
    return lambda path: text in path.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An option as convertctl has it and as Python has it, and what shows that it was taken."""

    format: str
    words: str
    options: dict[str, object]
    fact: Callable[[Path], object]
    value: object


CASES: Final = [
    Case(
        format="qcow2",
        words="--cluster-size 128K",
        options={"cluster_size": 128 * 1024},
        fact=cluster_size,
        value=128 * 1024,
    ),
    Case(
        format="qcow2",
        words="--compat 0.10",
        options={"compat": "0.10"},
        fact=data("compat"),
        value="0.10",
    ),
    Case(
        format="qcow2",
        words="--compat 1.1 --lazy-refcounts",
        options={"compat": "1.1", "lazy_refcounts": True},
        fact=data("lazy-refcounts"),
        value=True,
    ),
    Case(
        format="qcow2",
        words="--refcount-bits 8",
        options={"refcount_bits": 8},
        fact=data("refcount-bits"),
        value=8,
    ),
    Case(
        format="qcow2",
        words="--extended-l2",
        options={"extended_l2": True},
        fact=data("extended-l2"),
        value=True,
    ),
    Case(
        format="vmdk",
        words="-c --subformat streamOptimized",
        options={"compress": True, "subformat": "streamOptimized"},
        fact=data("create-type"),
        value="streamOptimized",
    ),
    Case(
        format="vmdk",
        words="--adapter-type legacyESX",
        options={"adapter_type": "legacyESX"},
        fact=says(b'ddb.adapterType = "legacyESX"'),
        value=True,
    ),
    Case(
        format="vmdk",
        words="--hwversion 7",
        options={"hwversion": 7},
        fact=says(b'ddb.virtualHWVersion = "7"'),
        value=True,
    ),
    # Version 2 of its header. Source: qemu block/vmdk.c, vmdk_init_extent.
    Case(
        format="vmdk",
        words="--zeroed-grain",
        options={"zeroed_grain": True},
        fact=number(4),
        value=2,
    ),
    # The image's type. Source: qemu block/vdi.c, VdiHeader.
    Case(format="vdi", words="--static", options={"static": True}, fact=number(76), value=2),
    Case(
        format="vpc",
        words="--subformat fixed",
        options={"subformat": "fixed"},
        fact=lambda path: path.stat().st_size,
        value=8 * MIB + 512,
    ),
    Case(
        format="vhdx",
        words="--subformat fixed --block-size 2M",
        options={"subformat": "fixed", "block_size": 2 * MIB},
        fact=cluster_size,
        value=2 * MIB,
    ),
    # The length in the first header. Source: qemu block/vhdx.h, VHDXHeader.
    Case(
        format="vhdx",
        words="--log-size 2M",
        options={"log_size": 2 * MIB},
        fact=number(65536 + 68),
        value=2 * MIB,
    ),
    Case(
        format="qed",
        words="--cluster-size 32K",
        options={"cluster_size": 32 * 1024},
        fact=cluster_size,
        value=32 * 1024,
    ),
    # Source: qemu block/qed.h, QEDHeader.
    Case(format="qed", words="--table-size 2", options={"table_size": 2}, fact=number(8), value=2),
    # Sectors in a cluster. Source: qemu block/parallels.h, ParallelsHeader.
    Case(
        format="parallels",
        words="--cluster-size 64K",
        options={"cluster_size": 64 * 1024},
        fact=number(28),
        value=128,
    ),
]


@pytest.fixture
def home(daemon: Daemon, images_dir: Path) -> Path:
    """A directory of the user's own in a root, with an image in it."""
    assert daemon.is_running
    images.small(images_dir / "in.raw")
    for path in (images_dir, images_dir / "in.raw"):
        os.chown(path, ALICE.uid, ALICE.gid)
    return images_dir


def convertctl(daemon: Daemon, source: Path, dest: Path, image_format: str, words: str) -> Ran:
    """Run `convertctl convert`."""
    ends = ("convert", str(source), str(dest), "-f", "raw", "-O", image_format)
    return ALICE.convertctl(daemon.socket, *ends, *words.split())


Asked = tuple[str, dict[str, object]]


def python(way: str, daemon: Daemon, home: Path, asked: list[Asked]) -> list[object]:
    """Convert in Python, in one of its ways, to files named by numbers; gives what came of it."""
    told = [(str(home / f"{index}"), *one) for index, one in enumerate(asked)]
    ran = ALICE.run(
        [PYTHON, "-I", "-c", SCRIPT],
        text=json.dumps([way, str(home / "in.raw"), told]),
        env={"CONVERTD_SOCKET": str(daemon.socket)},
    )
    assert ran.status == 0, ran
    return [json.loads(line) for line in ran.out.splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format} {case.words}")
def test_convertctl_creates_an_image_with_the_option(
    daemon: Daemon, home: Path, case: Case
) -> None:
    """Which is another than without, and holds the same disk."""
    source, dest, plain = home / "in.raw", home / "dest", home / "plain"
    ran = convertctl(daemon, source, dest, case.format, case.words)
    assert ran.status == 0, ran
    assert case.fact(dest) == case.value
    compare = ["qemu-img", "compare", "-f", "raw", "-F", case.format, str(source), str(dest)]
    subprocess.run(compare, check=True, stdout=subprocess.DEVNULL)
    assert convertctl(daemon, source, plain, case.format, "").status == 0
    assert case.fact(plain) != case.value


@pytest.mark.parametrize("way", WAYS)
def test_python_clients_create_images_with_all_options(
    daemon: Daemon, home: Path, way: str
) -> None:
    """By both clients, and without a daemon."""
    done = python(way, daemon, home, [(case.format, case.options) for case in CASES])
    assert done == ["done"] * len(CASES)
    for index, case in enumerate(CASES):
        assert case.fact(home / f"{index}") == case.value, case


REFUSED: Final[list[tuple[str, dict[str, object], str]]] = [
    ("raw", {"cluster_size": 65536}, "dest.raw.cluster_size"),
    ("vdi", {"subformat": "dynamic"}, "dest.vdi.subformat"),
    ("vmdk", {"subformat": "flat"}, "dest.vmdk.subformat"),
    ("qcow2", {"cluster_size": 1000}, "dest.qcow2.cluster_size"),
    ("qcow2", {"compat": "0.10", "extended_l2": True}, "dest.qcow2.extended_l2"),
    ("raw", {"is_zero": True}, "dest.is_zero"),
]
"""A format, an option that it does not take or not so, and the name under which it is refused."""


@pytest.mark.parametrize("way", WAYS)
def test_invalid_format_option_is_named_in_the_refusal(
    daemon: Daemon, home: Path, way: str
) -> None:
    """In all ways alike, whoever judges it."""
    asked = [(image_format, options) for image_format, options, _ in REFUSED]
    fields = [field for _, _, field in REFUSED]
    assert python(way, daemon, home, asked) == [["BAD_OPTION", field] for field in fields]
    assert os.listdir(home) == ["in.raw"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--cluster-size 64K", 1, "dest.raw.cluster_size: the format has no such option"),
        ("--cluster-size x", 2, "--cluster-size"),
        ("--compat 2", 2, "--compat"),
        ("--target-is-zero", 1, "dest.is_zero: is for devices only"),
    ],
    ids=["another-format", "no-size", "no-choice", "no-device"],
)
def test_convertctl_names_the_refused_option(
    daemon: Daemon, home: Path, words: str, status: int, said: str
) -> None:
    """As it was typed, or as the contract has it."""
    ran = convertctl(daemon, home / "in.raw", home / "dest", "raw", words)
    assert ran.status == status
    assert said in ran.err


def test_subformat_of_several_files_is_not_supported(daemon: Daemon, home: Path) -> None:
    """A result is one file."""
    words = "--subformat twoGbMaxExtentFlat"
    ran = convertctl(daemon, home / "in.raw", home / "dest", "vmdk", words)
    assert ran.status == 1
    assert "UNSUPPORTED" in ran.err


def test_claimed_zero_destination_is_not_written_with_zeroes(
    daemon: Daemon, volumes: Devices, home: Path
) -> None:
    """The claim is taken at its word: here it is wrong, and where the image is zero nothing is."""
    for name, claimed in (("told", True), ("untold", False)):
        volume = volumes.add(name, 16 * MIB)
        words = "--target-is-zero" if claimed else ""
        ran = convertctl(daemon, home / "in.raw", volume, "raw", words)
        assert ran.status == 0, ran
        written = volumes.bytes_on(volume)
        assert written[:MIB] == (home / "in.raw").read_bytes()[:MIB]
        assert written[2 * MIB : 3 * MIB] == (b"\xaa" if claimed else b"\0") * MIB


@pytest.mark.parametrize(
    ("dest_format", "offered"), [("vmdk", "streamOptimized"), ("vpc", "fixed")]
)
def test_shell_completion_lists_the_subformats_of_the_format(
    dest_format: str, offered: str
) -> None:
    """With those of the format."""
    words = f"convertctl convert a b -O {dest_format} --subformat "
    environment = {
        "_CONVERTCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split())),
    }
    listed = ALICE.run([CONVERTCTL], env=environment).out.split()
    assert f"plain,{offered}" in listed
    assert len(listed) == len(creation_options.OPTIONS[dest_format]["subformat"].known)
