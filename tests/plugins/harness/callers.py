"""Who asks: users that own nothing, and the programs with which they ask."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness import programs

PYTHON: Final = programs.PYTHON
CONVERTCTL: Final = programs.CONVERTCTL
GRPCURL: Final = programs.GRPCURL

SERVICE: Final = "convertd.v1.ConvertService"
TIMEOUT_S: Final = 100.0

_CLIENT: Final = """
import dataclasses, json, sys
import convertd_client
method, arguments, options = json.loads(sys.stdin.read())
with convertd_client.Client() as client:
    try:
        done = getattr(client, method)(*arguments, **options)
        print(json.dumps(dataclasses.asdict(done), default=str))
    except convertd_client.ConvertError as error:
        print(json.dumps({"error": type(error).__name__, "reason": error.reason,
                          "message": str(error), "metadata": dict(error.metadata)}))
        sys.exit(1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a program did."""

    status: int
    out: str
    err: str

    def json(self) -> Any:  # noqa: ANN401 - JSON is anything
        """Its standard output."""
        return json.loads(self.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A user without an account: a uid, a gid, and further groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = field(default=())

    def popen(
        self,
        argv: Sequence[str],
        **options: Any,  # noqa: ANN401 - as Popen has them
    ) -> subprocess.Popen[bytes]:
        """Start a program as this user, with nothing of ours in its environment."""
        options.setdefault("stdin", subprocess.DEVNULL)
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **options.pop("env", {})}
        return subprocess.Popen(
            argv,
            user=self.uid,
            group=self.gid,
            extra_groups=self.groups,
            cwd="/",
            env=environment,
            **options,
        )

    def run(
        self, argv: Sequence[str], *, text: str = "", env: Mapping[str, str] | None = None
    ) -> Ran:
        """Run a program to its end as this user."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with self.popen(argv, env=env or {}, **pipes) as process:
            try:
                out, err = process.communicate(text.encode(), TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Ran(status=process.returncode, out=out.decode(), err=err.decode())

    def convertctl(self, socket: Path, *arguments: str) -> Ran:
        """Run convertctl."""
        return self.run([CONVERTCTL, *arguments], env={"CONVERTD_SOCKET": str(socket)})

    def client(self, socket: Path, method: str, *arguments: str, **options: object) -> Ran:
        """Call a method of convertd_client.Client; what it gives, or raises, is printed as JSON."""
        order = json.dumps([method, arguments, options])
        argv = [PYTHON, "-I", "-c", _CLIENT]
        return self.run(argv, text=order, env={"CONVERTD_SOCKET": str(socket)})

    def grpcurl(self, socket: Path, method: str, request: object) -> Ran:
        """Make a call with grpcurl, which learns the contract from the daemon itself."""
        argv = [GRPCURL, "-plaintext", "-unix", "-format-error", "-d", "@"]
        return self.run([*argv, str(socket), f"{SERVICE}/{method}"], text=json.dumps(request))


ROOT: Final = Caller(uid=0, gid=0)
ALICE: Final = Caller(uid=1234, gid=1234, groups=(1300, 1400))
BOB: Final = Caller(uid=1235, gid=1235)
MALLORY: Final = Caller(uid=1666, gid=1666)
"""Whom no policy names."""


def owner_of(path: Path) -> tuple[int, int, int]:
    """Uid, gid and permission bits of a file."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid, status.st_mode & 0o7777


def make_reachable(tmp_path: Path) -> None:
    """Open the way to one of pytest's directories, which are root's alone."""
    for directory in (tmp_path, *tmp_path.parents):
        directory.chmod(0o755)
        if directory.name.startswith("pytest-of-"):
            return
    raise AssertionError(f"{tmp_path} is none of pytest's")


def come_and_go(path: Path) -> bool:
    """Connect and be gone, if there is room."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return False
        return True
