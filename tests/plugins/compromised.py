"""A Python in the place of qemu-img, with its confinement: as if an image had taken it over."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from children import in_child

from convertd_daemon.sandbox import spawn

WORKER = spawn.Identity(uid=1500, gid=1500)


def output_of(child: spawn.ConfinedProgram) -> str:
    """Read stdout to its end, and say on failure what stderr said."""
    os.set_blocking(child.stdout, True)
    os.set_blocking(child.stderr, True)
    with os.fdopen(os.dup(child.stdout)) as out, os.fdopen(os.dup(child.stderr)) as err:
        text, complaint = out.read(), err.read()
    status = child.wait()
    assert status == 0, f"status {status}: {complaint}"
    return text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompromisedProgram:
    """A Python that runs where qemu-img would, confined as qemu-img is."""

    program: int
    confinement: spawn.Confinement

    def but(
        self,
        *,
        abi: int | None = None,
        identity: spawn.Identity | None = WORKER,
        keep_read_search: bool = False,
        write: tuple[int, ...] = (),
    ) -> CompromisedProgram:
        """Change the confinement."""
        changed = dataclasses.replace(
            self.confinement,
            abi=abi,
            identity=identity,
            keep_read_search=keep_read_search,
            write=write,
        )
        return CompromisedProgram(program=self.program, confinement=changed)

    def start(self, script: str, *, inherit: tuple[int, ...] = ()) -> spawn.ConfinedProgram:
        """Execute a script in the sandbox."""
        argv = [sys.executable, "-I", "-S", "-B", "-c", script]
        return spawn.spawn(self.program, argv, confinement=self.confinement, inherit=inherit)

    def tries(self, script: str, *, inherit: tuple[int, ...] = ()) -> dict[str, str]:
        """Give what became of each `attempt(name, function)` of a script: an errno, or "done"."""
        script = f"{_ATTEMPTS}\n{script}\nprint(json.dumps(outcomes))"

        def run() -> dict[str, str]:
            with self.start(script, inherit=inherit) as child:
                outcomes: dict[str, str] = json.loads(output_of(child))
                return outcomes

        return in_child(run)


_ATTEMPTS = """
import ctypes, errno, json, os, signal, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
outcomes = {}

def attempt(name, function):
    try:
        function()
    except OSError as error:
        outcomes[name] = errno.errorcode[error.errno]
    else:
        outcomes[name] = "done"

def call(number, *arguments):
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(number), *wide) == -1:
        raise OSError(ctypes.get_errno(), "")
"""
