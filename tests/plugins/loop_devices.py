"""Loop devices as block devices to convert from and to, under names like those of LVM."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK_GROUP: Final = 1700
"""The group of devices here; on a real machine it is `disk`."""


class Devices:
    """Loop devices, with links to them in a directory of their own in /dev, as udev makes them."""

    def __init__(self, directory: Path, links: Path, undo: contextlib.ExitStack) -> None:
        """Keep what is on them in `directory`; the names are in `links`."""
        self.directory = directory
        self.links = links
        self.undo = undo

    def add(
        self, name: str, size_bytes: int, *, sector_bytes: int = 512, dirty: bool = True
    ) -> Path:
        """A device that its group may write; gives its name. A dirty one has no zero on it."""
        backing = self.directory / f"{name}.backing"
        if dirty:
            backing.write_bytes(b"\xaa" * size_bytes)
        else:
            with backing.open("wb") as file:
                file.truncate(size_bytes)
        argv = ["losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(backing)]
        node = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        self.undo.callback(_detach, node)
        before = os.stat(node)
        self.undo.callback(os.chmod, node, before.st_mode & 0o7777)
        self.undo.callback(os.chown, node, before.st_uid, before.st_gid)
        os.chown(node, 0, DISK_GROUP)
        os.chmod(node, 0o660)
        link = self.links / name
        link.symlink_to(f"../{os.path.basename(node)}")
        return link

    def bytes_on(self, name: Path) -> bytes:
        """All that is on a device, read past what the page cache of others may hold."""
        subprocess.run(["blockdev", "--flushbufs", str(name)], check=True)
        return name.read_bytes()


def _detach(node: str) -> None:
    subprocess.run(["losetup", "--detach", node], check=True)


@contextlib.contextmanager
def made(directory: Path, links: Path | None = None) -> Iterator[Devices]:
    """Make devices, named in `links`; all are gone afterwards, whatever happened."""
    links = links or Path("/dev") / f"convertd-test-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as undo:
        links.mkdir(mode=0o755, exist_ok=True)
        undo.callback(shutil.rmtree, links)
        yield Devices(directory, links, undo)
