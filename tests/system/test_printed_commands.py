"""Each command that a message prints is run, on the case for which it is printed, and helps."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
from harness.callers import ALICE, Ran
from harness.daemon import COMMAND, Daemon
from policies import Grant, Policy, Root

IMAGES: Final = Root("images", "{scratch}/images", accept_damaged=True)
CALLERS: Final = Root("callers", "{scratch}/callers", access="caller")
POLICY: Final = Policy(
    grants=[
        Grant(
            read=[IMAGES, CALLERS], write=[IMAGES], formats=["raw", "qcow2", "qed"], overwrite="any"
        )
    ]
)


def qemu_img(*arguments: str) -> None:
    """Run it; it must succeed."""
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)


def converted(daemon: Daemon, *arguments: str) -> Ran:
    """`convertctl convert` as somebody who is granted it."""
    return ALICE.convertctl(daemon.socket, "convert", "-q", *arguments)


def overlay_without_format(directory: Path, base: str) -> Path:
    """An overlay as old qemu made it: it names its base, and not the base's format."""
    qemu_img("create", "-q", "-f", "qcow2", str(directory / base), "1M")
    argv = ["qemu-io", "-c", "write -P 7 0 1M", str(directory / base)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    overlay = directory / "over lay"
    made = ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, str(overlay))
    subprocess.run(["qemu-img", *made], check=True, cwd=directory)
    data = overlay.read_bytes()
    # The type of the header's extension becomes one that nobody knows.
    overlay.write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1))
    return overlay


@pytest.mark.parametrize("base", ["base.qcow2", "it's a base"])
def test_printed_command_for_an_overlay_without_a_format_keeps_its_base(
    daemon: Daemon, images_dir: Path, base: str
) -> None:
    """What was printed once took the base away, and with it all that the overlay had not."""
    overlay, out = overlay_without_format(images_dir, base), images_dir / "out"
    arguments = (str(overlay), str(out), "-O", "raw")
    ran = converted(daemon, *arguments)
    assert ran.status == 1
    (line, *_) = ran.err.splitlines()
    found = re.search(r"set it: (qemu-img rebase .*) \(BACKING_REFUSED\)", line)
    assert found, ran.err
    subprocess.run(["sh", "-c", found[1]], check=True)
    assert converted(daemon, *arguments).status == 0
    assert out.read_bytes() == b"\x07" * 1024 * 1024


def test_command_that_does_not_fit_into_the_message_is_not_printed(
    daemon: Daemon, images_dir: Path
) -> None:
    """Half of one may do anything."""
    overlay = overlay_without_format(images_dir, "b" * 250)
    ran = converted(daemon, str(overlay), str(images_dir / "out"), "-O", "raw")
    assert "which was found to be qcow2" in ran.err
    assert "rebase" not in ran.err


@pytest.mark.parametrize("group", [True, False], ids=["its group is there", "nothing is there"])
@pytest.mark.parametrize("user", ["convertd", "convertd-qemu"])
def test_printed_command_for_a_missing_user_creates_it(
    daemon: Daemon, tmp_path: Path, user: str, *, group: bool
) -> None:
    """In a copy of /etc: what is run here is what `convertd check` says there."""
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True)
    for name in ("passwd", "shadow", *(() if group else ("group", "gshadow"))):
        lines = (etc / name).read_text().splitlines(keepends=True)
        (etc / name).write_text("".join(line for line in lines if not line.startswith(f"{user}:")))

    def there(command: str) -> subprocess.CompletedProcess[str]:
        script = f"mount --bind {etc} /etc && {command}"
        argv = ["unshare", "--mount", "sh", "-c", script]
        return subprocess.run(argv, check=False, capture_output=True, text=True)

    check = f"{COMMAND} --policy {daemon.policy_path} check"
    found = re.search(rf"there is no user {user}; make it with: (.*)", there(check).stderr)
    assert found
    done = there(f"{found[1]} && {check}")
    assert f"no user {user}" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_printed_command_for_hard_links_protects_them(daemon: Daemon, tmp_path: Path) -> None:
    """As /proc says afterwards; it is on here already, and stays."""
    setting = tmp_path / "setting"
    setting.write_text("0\n")
    check = f"{COMMAND} --policy {daemon.policy_path} check"
    script = f"mount --bind {setting} /proc/sys/fs/protected_hardlinks && {check}"
    argv = ["unshare", "--mount", "sh", "-c", script]
    ran = subprocess.run(argv, check=False, capture_output=True, text=True)
    found = re.search(r"turn it on with: (.*)", ran.stderr)
    assert found
    subprocess.run(shlex.split(found[1]), check=True, stdout=subprocess.DEVNULL)
    assert Path("/proc/sys/fs/protected_hardlinks").read_text() == "1\n"


def hint_of(ran: Ran) -> str:
    """The second line of a failure."""
    assert ran.status == 1
    return ran.err.splitlines()[1].strip()


@pytest.mark.parametrize("local", [False, True], ids=["daemon", "local"])
def test_hint_of_convertctl_works_when_followed(
    daemon: Daemon, images_dir: Path, *, local: bool
) -> None:
    """A name that is taken, a format that is not the right one."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    image, out = images_dir / "in", images_dir / "out"
    qemu_img("create", "-q", "-f", "qcow2", str(image), "1M")
    out.touch()
    here = ("--local",) if local else ()
    argv = (str(image), str(out), "-O", "raw", *here)
    hint = hint_of(converted(daemon, *argv))
    assert hint == "--overwrite replaces it"
    assert converted(daemon, *argv, hint.split()[0]).status == 0
    hint = hint_of(converted(daemon, *argv, "--overwrite", "-f", "qed"))
    command = re.match("`convertctl (.*)` without -f", hint)
    assert command
    assert ALICE.convertctl(daemon.socket, *command[1].split(), str(image)).status == 0


@pytest.mark.parametrize("local", [False, True], ids=["daemon", "local"])
def test_printed_option_for_a_damaged_image_converts_it(
    daemon: Daemon, images_dir: Path, *, local: bool
) -> None:
    """One that qemu has marked as corrupt, where its root allows that."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    image, out = images_dir / "in", images_dir / "out"
    qemu_img("create", "-q", "-f", "qcow2", str(image), "1M")
    with image.open("r+b") as file:
        file.seek(79)
        file.write(b"\2")
    here = ("--local",) if local else ()
    argv = (str(image), str(out), "-O", "raw", *here)
    hint = hint_of(converted(daemon, *argv))
    assert hint == "--accept-damaged converts it as it is"
    ran = converted(daemon, *argv, hint.split()[0])
    assert ran.status == 0
    assert "SOURCE_DAMAGED" in ran.err


def test_hint_matches_the_access_rights_that_were_used(
    daemon: Daemon, images_dir: Path, scratch: Path
) -> None:
    """Who converts with its own is not told of a policy, nor sent to the daemon's log."""
    closed = scratch / "callers" / "closed"
    closed.write_bytes(bytes(512))
    closed.chmod(0o600)
    argv = (str(closed), str(images_dir / "out"), "-f", "raw", "-O", "raw")
    assert "your own rights; see `convertctl access`" in hint_of(converted(daemon, *argv))
    local = converted(daemon, *argv, "--local")
    assert "with the rights of uid 1234" in local.err
    assert len(local.err.splitlines()) == 1


def test_local_conversion_failure_shows_the_message_of_qemu_img(
    images_dir: Path, daemon: Daemon
) -> None:
    """It was run with one's own rights, and there is no log."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    image = images_dir / "in"
    qemu_img("create", "-q", "-f", "qcow2", str(image), "1M")
    with image.open("r+b") as file:
        file.seek(20)
        file.write(bytes([0, 0, 0, 99]))
    argv = (str(image), str(images_dir / "out"), "-f", "qcow2", "-O", "raw")
    assert "Unsupported cluster size" in converted(daemon, *argv, "--local").err
    output = converted(daemon, *argv).err
    assert "cluster size" not in output


def test_plan_command_creates_the_same_image(daemon: Daemon, images_dir: Path) -> None:
    """With every option, it can be pasted."""
    image, out, other = (images_dir / name for name in ("in", "out", "other"))
    image.write_bytes(os.urandom(1 << 20))
    argv = (str(image), str(out), "-f", "raw", "-O", "qcow2", "--cluster-size", "4096", "--json")
    ran = converted(daemon, *argv, "--preallocation", "metadata", "--dry-run")
    assert ran.status == 0, ran.err
    found = re.search(r'"command": \[(.*?)\]', ran.out)
    assert found, ran.out
    words = [word.strip('" ') for word in found[1].split('", "')]
    qemu_img(*words[1:-1], str(other))
    assert converted(daemon, *argv, "--preallocation", "metadata").status == 0
    qemu_img("compare", "-s", str(out), str(other))
    assert out.stat().st_size == other.stat().st_size
