"""File systems of several kinds, mounted for a test and taken away again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final, Self

from harness import waiting

MIB: Final = 1024 * 1024

_MAKERS: Final = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
_LEAST_MIB: Final = {"ext4": 16, "xfs": 320, "btrfs": 128, "ntfs": 64}


class Mounts:
    """Mounts below one directory. Leave the context, and all are gone."""

    def __init__(self, directory: Path) -> None:
        """Mount in sub-directories of this one; images of file systems are kept beside them."""
        self._directory = directory
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def on_a_loop(
        self,
        kind: str,
        name: str,
        size_mib: int = 0,
        *,
        options: tuple[str, ...] = (),
        direct_io: bool = False,
    ) -> Path:
        """An ext4, XFS or btrfs on a loop device. It takes space as it is filled.

        With `direct_io` nothing of it is in the page cache twice: not in that of its image.
        """
        image = self._directory / f".{name}.{kind}"
        with image.open("wb") as file:
            file.truncate(max(size_mib, _LEAST_MIB[kind]) * MIB)
        self._undo.callback(image.unlink)
        _run(*_MAKERS[kind], *options, str(image))
        point = self._mount(name, "-o", "loop", str(image))
        if direct_io:
            argv = ["findmnt", "--noheadings", "--output=SOURCE", str(point)]
            device = subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout
            _run("losetup", "--direct-io=on", device.strip())
        return point

    def in_memory(self, kind: str, name: str, options: str = "mode=755") -> Path:
        """A tmpfs, or a ramfs, which refuses direct I/O."""
        return self._mount(name, "-t", kind, "-o", options, "none")

    def bound(self, directory: Path, name: str, *, read_only: bool = False) -> Path:
        """A directory once more, in another place."""
        point = self._mount(name, "--bind", str(directory))
        if read_only:
            _run("mount", "-o", "remount,bind,ro", str(point))
        return point

    def overlaid(self, directory: Path, name: str) -> Path:
        """A directory once more, by overlayfs: what is changed is copied first."""
        changes = self._directory / f".{name}.changes"
        for part in ("upper", "work"):
            (changes / part).mkdir(parents=True)
        self._undo.callback(shutil.rmtree, changes)
        owner = directory.stat()
        os.chown(changes / "upper", owner.st_uid, owner.st_gid)
        upper = f"upperdir={changes}/upper,workdir={changes}/work"
        options = f"lowerdir={directory},{upper},redirect_dir=on"
        return self._mount(name, "-t", "overlay", "-o", options, "none")

    def by_fuse(self, directory: Path, name: str, *options: str) -> Path:
        """A directory once more, by bindfs: FUSE, which has no O_TMPFILE."""
        point = self._point(name)
        _run("bindfs", *options, str(directory), str(point))
        self._undo.callback(_unmount, point)
        return point

    def ntfs(self, name: str, options: str = "") -> Path:
        """An NTFS by ntfs-3g, which keeps no owners unless it is told how."""
        image = self._directory / f".{name.replace('/', '-')}.ntfs"
        with image.open("wb") as file:
            file.truncate(_LEAST_MIB["ntfs"] * MIB)
        self._undo.callback(image.unlink)
        _run(
            "mkfs.ntfs", "-q", "-F", "-Q", "-s", "512", "-p", "0", "-H", "1", "-S", "1", str(image)
        )
        point = self._point(name)
        _run("ntfs-3g", *(("-o", options) if options else ()), str(image), str(point))
        self._undo.callback(_unmount, point)
        return point

    def _mount(self, name: str, *arguments: str) -> Path:
        point = self._point(name)
        _run("mount", *arguments, str(point))
        self._undo.callback(_unmount, point)
        return point

    def _point(self, name: str) -> Path:
        point = self._directory / name
        point.mkdir()
        self._undo.callback(point.rmdir)
        return point


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def _unmount(point: Path) -> None:
    """Unmount. A file that a daemon left open would keep that from succeeding."""
    waiting.until(
        lambda: (
            subprocess.run(["umount", str(point)], check=False, capture_output=True).returncode == 0
        ),
        f"umount {point}",
    )
    assert not os.path.ismount(point)
