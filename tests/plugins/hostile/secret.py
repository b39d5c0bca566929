"""A file that must never be read, and ways to name it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness import waiting

from hostile import forged


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A directory that is root's alone, below no root of the policy, with a marked file in it.

    The file is there as raw bytes and as images of each kind that can be stood on. `absent` is a
    directory of a name as long that is not there, so that images can be made that differ in that
    alone.
    """

    directory: Path
    marker: bytes

    @property
    def raw(self) -> Path:
        """The file itself."""
        return self.directory / "disk.raw"

    @property
    def socket(self) -> Path:
        """Where a qemu-nbd serves it."""
        return self.directory / "nbd"

    @property
    def absent(self) -> Path:
        """What the directory is not called."""
        name = self.directory.name
        return self.directory.with_name(f"{name[:-1]}{'0' if name[-1] != '0' else '1'}")

    def image(self, image_format: str) -> Path:
        """The same content in a format."""
        return self.directory / f"disk.{image_format}"

    def unchanged(self) -> bool:
        """Whether nobody wrote to it, or beside it."""
        return self.raw.read_bytes() == content(self.marker) and set(
            os.listdir(self.directory)
        ) <= {
            *("disk.raw", "disk.qcow2", "disk.vmdk", "nbd"),
        }


def content(marker: bytes) -> bytes:
    """The marker, over and over."""
    return (marker * (forged.SIZE // len(marker) + 1))[: forged.SIZE]


def made(directory: Path) -> Secret:
    """Make one. Its marker is in no other file of this machine."""
    directory.mkdir(mode=0o700)
    secret = Secret(directory=directory, marker=f"<{secrets.token_hex(15)}>".encode())
    secret.raw.write_bytes(content(secret.marker))
    secret.raw.chmod(0o600)
    for image_format in ("qcow2", "vmdk"):
        argv = ["qemu-img", "convert", "-f", "raw", "-O", image_format, str(secret.raw)]
        subprocess.run([*argv, str(secret.image(image_format))], check=True)
    return secret


def served(secret: Secret) -> subprocess.Popen[bytes]:
    """Serve it by NBD, to whoever can reach the socket; the caller ends the server."""
    argv = ["qemu-nbd", "--read-only", "--persistent", "--format=raw", "--shared=0"]
    server = subprocess.Popen([*argv, f"--socket={secret.socket}", str(secret.raw)])
    waiting.until(secret.socket.exists, "qemu-nbd listens")
    return server


def as_json(path: Path | str) -> str:
    """A file as one of qemu's pseudo names."""
    node = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    return "json:" + json.dumps(node, separators=(",", ":"))
