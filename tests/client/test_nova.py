"""nova: Nova's four functions, held against what Nova 34 has and does."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.callers import ALICE, PYTHON
from harness.daemon import Daemon
from hostile import containers
from policies import IMAGES, Grant, Policy

POLICY: Final = Policy(
    grants=[
        Grant(
            read=[IMAGES],
            write=[IMAGES],
            formats=["raw", "qcow2", "vmdk", "luks", "vpc"],
            overwrite="any",
        )
    ]
)

SIGNATURES: Final = {
    "convert_image": "(source, dest, in_format, out_format, instances_path, compress, "
    "src_encryption=None, dest_encryption=None)",
    "unprivileged_convert_image": "(source, dest, in_format, out_format, instances_path, "
    "compress, src_encryption=None, dest_encryption=None)",
    "privileged_qemu_img_info": "(path, format=None)",
    "unprivileged_qemu_img_info": "(path, format=None)",
}
"""Source: nova/privsep/qemu.py of Nova 34.0.0."""

SCRIPT: Final = """
import dataclasses, inspect, json, sys
from convertd_client import ConvertError, nova
name, *arguments = json.loads(sys.argv[1])
try:
    done = getattr(nova, name)(*arguments)
    print(json.dumps(done if isinstance(done, str) else dataclasses.asdict(done)))
except ConvertError as error:
    print(json.dumps([type(error).__name__, error.reason]))
"""

FUNCTIONS: Final = ("convert_image", "unprivileged_convert_image")


@pytest.fixture
def home(daemon: Daemon, images_dir: Path, library: Path) -> Iterator[Path]:
    """A directory of the user's own in the granted root, with an image in it."""
    assert daemon.is_running
    shutil.copy(library / "small.raw", images_dir / "a.raw")
    for path in (images_dir, images_dir / "a.raw"):
        os.chown(path, ALICE.uid, ALICE.gid)
    yield images_dir
    shutil.rmtree(images_dir)


@pytest.fixture
def call(daemon: Daemon) -> Callable[..., object]:
    """Call one of the functions as the user."""

    def run(name: str, *arguments: object) -> object:
        told = json.dumps([name, *arguments], default=str)
        environment = {"CONVERTD_SOCKET": str(daemon.socket)}
        ran = ALICE.run([PYTHON, "-I", "-c", SCRIPT, told], env=environment)
        assert ran.status == 0, ran.err
        return ran.json()

    return run


def as_nova_would(source: Path, dest: Path, out_format: str, *, compress: bool) -> None:
    """Run the qemu-img command that Nova's function makes."""
    flags = ["-c"] if compress else []
    argv = ["qemu-img", "convert", "-t", "none", "-O", out_format, "-f", "raw", *flags]
    subprocess.run([*argv, str(source), str(dest)], check=True)


@pytest.mark.parametrize("name", SIGNATURES)
def test_nova_functions_have_the_arguments_of_nova(name: str) -> None:
    """By name and in order, for some callers use the one and some the other."""
    script = (
        "import inspect, sys; from convertd_client import nova;"
        "print(inspect.signature(getattr(nova, sys.argv[1])))"
    )
    ran = ALICE.run([PYTHON, "-I", "-c", script, name])
    ours = eval(f"lambda {_without_types(ran.out)}: 0")  # noqa: S307 - our own signature
    theirs = eval(f"lambda {SIGNATURES[name].strip('()')}: 0")  # noqa: S307 - as above
    assert inspect.signature(ours) == inspect.signature(theirs)


def _without_types(signature: str) -> str:
    """The parameters of a signature without their annotations."""
    listed = signature.strip().partition("->")[0].strip().strip("()")
    names = []
    for parameter in listed.replace("Encryption | None", "Encryption").split(","):
        name, _, rest = parameter.partition(":")
        default = rest.partition("=")[2].strip()
        names.append(f"{name.strip()}={default}" if default else name.strip())
    return ", ".join(names)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("out_format", ["qcow2", "vmdk"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nova_result_equals_that_of_qemu_img(
    name: str, out_format: str, home: Path, call: Callable[..., object], *, compress: bool
) -> None:
    """The same disk for a guest, compressed or not; a vmdk never is, whatever qemu-img is told."""
    as_nova_would(home / "a.raw", home / "theirs", out_format, compress=compress)
    call(name, home / "a.raw", home / "ours", "raw", out_format, home, compress)
    assert images.identical(home / "theirs", home / "ours")
    sizes = [(home / side).stat().st_blocks for side in ("theirs", "ours")]
    assert min(sizes) > 0.9 * max(sizes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nova_format_without_compression_is_refused(
    name: str, home: Path, call: Callable[..., object]
) -> None:
    """As there, before anything is written."""
    with pytest.raises(subprocess.CalledProcessError):
        as_nova_would(home / "a.raw", home / "theirs", "raw", compress=True)
    refused = call(name, home / "a.raw", home / "ours", "raw", "raw", home, True)
    assert refused == ["InvalidArgument", "BAD_OPTION"]
    assert not (home / "ours").exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nova_existing_destination_is_replaced(
    name: str, home: Path, call: Callable[..., object]
) -> None:
    """As qemu-img overwrites it."""
    (home / "b").write_text("old")
    os.chown(home / "b", ALICE.uid, ALICE.gid)
    call(name, home / "a.raw", home / "b", "raw", "raw", home, False)
    assert images.identical(home / "a.raw", home / "b")


def test_nova_local_result_has_mode_0644_less_the_umask(
    home: Path, call: Callable[..., object]
) -> None:
    """0644, less the umask: others read Nova's base images."""
    call("unprivileged_convert_image", home / "a.raw", home / "b", None, "raw", home, False)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((home / "b").stat().st_mode) == 0o644 & ~umask


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("instances", "mode"),
    [("direct", "none"), ("ramfs", "writeback"), ("missing", "writeback")],
)
def test_nova_cache_mode_is_the_one_nova_selects(
    name: str, instances: str, mode: str, home: Path, call: Callable[..., object]
) -> None:
    """From whether instances_path takes direct writes. The destination does, each time."""
    path = home / instances
    source = images.converted(home / "a.raw", home / "a.qcow2", "qcow2")
    os.chown(source, ALICE.uid, ALICE.gid)
    if instances != "missing":
        path.mkdir()
    if instances == "ramfs":
        subprocess.run(["mount", "-t", "ramfs", "none", str(path)], check=True)
    try:
        for directory in (path,) if path.exists() else ():
            os.chown(directory, ALICE.uid, ALICE.gid)
        done = call(name, source, home / "b", "qcow2", "raw", path, False)
    finally:
        if instances == "ramfs":
            subprocess.run(["umount", str(path)], check=True)
    assert isinstance(done, dict)
    assert done["dest_cache"]["mode"] == mode


@pytest.mark.parametrize("name", ["privileged_qemu_img_info", "unprivileged_qemu_img_info"])
def test_nova_info_is_the_output_of_qemu_img(
    name: str, home: Path, call: Callable[..., object]
) -> None:
    """For oslo.utils' QemuImgInfo, which parses it."""
    images.converted(home / "a.raw", home / "b.qcow2", "qcow2")
    os.chown(home / "b.qcow2", ALICE.uid, ALICE.gid)
    told = call(name, home / "b.qcow2")
    argv = ["qemu-img", "info", "--output=json", str(home / "b.qcow2")]
    theirs = subprocess.run(argv, check=True, capture_output=True)
    assert isinstance(told, str)
    assert json.loads(told) == json.loads(theirs.stdout)
    assert json.loads(str(call(name, home / "b.qcow2", "raw")))["format"] == "raw"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nova_encryption_other_than_luks_is_refused(
    name: str, home: Path, call: Callable[..., object]
) -> None:
    """Rather than taken for LUKS."""
    secret = {"secret": "x", "format": "aes"}
    arguments = [home / "a.raw", home / "b", "raw", "qcow2", home, False]
    assert call(name, *arguments, None, secret) == ["Unimplemented", "UNSUPPORTED"]
    assert call(name, *arguments, secret) == ["Unimplemented", "UNSUPPORTED"]
    assert not (home / "b").exists()


def test_nova_ploop_image_is_inspected_in_its_directory(
    home: Path, call: Callable[..., object]
) -> None:
    """As Nova does."""
    ploop = home / "ploop"
    ploop.mkdir()
    (ploop / "DiskDescriptor.xml").touch()
    images.converted(home / "a.raw", ploop / "root.hds", "parallels")
    for path in (ploop, ploop / "root.hds"):
        os.chown(path, ALICE.uid, ALICE.gid)
    told = json.loads(str(call("unprivileged_qemu_img_info", ploop)))
    assert told["filename"] == str(ploop / "root.hds")


# --- under eventlet --------------------------------------------------------------------------

GREEN: Final = """
import sys, types
eventlet = sys.modules["eventlet"] = types.ModuleType("eventlet")
eventlet.patcher = types.SimpleNamespace(is_monkey_patched=lambda name: name == "thread")
from convertd_client import ConvertError, nova
path, dest, directory = sys.argv[1:]
print(nova.convert_image(path, dest, "raw", "qcow2", directory, False).method)
print(nova.privileged_qemu_img_info(dest))
try:
    nova.privileged_qemu_img_info("/etc/shadow")
except ConvertError as error:
    print(type(error).__name__, error.reason)
"""


def test_nova_under_eventlet_calls_the_daemon_from_a_child_process(
    daemon: Daemon, home: Path
) -> None:
    """In which gRPC runs as it should. Results and errors are the same."""
    arguments = [str(home / "a.raw"), str(home / "b"), str(home)]
    environment = {"CONVERTD_SOCKET": str(daemon.socket)}
    ran = ALICE.run([PYTHON, "-I", "-c", GREEN, *arguments], env=environment)
    method, info, refusal = ran.out.splitlines()
    assert (ran.status, ran.err) == (0, "")
    assert method == "copy"
    assert json.loads(info)["format"] == "qcow2"
    assert refusal == "PermissionDenied PERMISSION_DENIED"
    assert images.identical(home / "a.raw", home / "b")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("in_format", "data", "reason"),
    [
        ("vpc", containers.Vhd(disk_type=containers.DIFFERENCING).sparse({}), "IMAGE_REFUSED"),
        (None, containers.Vhd(disk_type=containers.DIFFERENCING).sparse({}), "IMAGE_REFUSED"),
        (None, containers.packed(bytes(4096))["gzip"], "AMBIGUOUS_FORMAT"),
        (None, containers.with_header(containers.cd()), "AMBIGUOUS_FORMAT"),
    ],
    ids=["differencing-stated", "differencing", "gzip", "two-in-one"],
)
def test_nova_image_that_would_lose_data_is_refused(  # noqa: PLR0913, PLR0917 - what is tried, and where
    home: Path,
    call: Callable[..., object],
    function: str,
    in_format: str | None,
    data: bytes,
    reason: str,
) -> None:
    """With a daemon and without. Nova's own function says nothing, and writes zeroes or rubbish."""
    (home / "image").write_bytes(data)
    os.chown(home / "image", ALICE.uid, ALICE.gid)
    told = call(function, home / "image", home / "out", in_format, "raw", home, False)
    assert told == ["ImageRefused", reason]
    assert not (home / "out").exists()
