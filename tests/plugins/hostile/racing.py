"""A user who changes files while the daemon looks at them: some thousand times a second."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness import waiting
from harness.callers import PYTHON, Caller

_REWRITE: Final = """
import base64, json, os, random, select, sys, time
order = json.loads(sys.stdin.readline())
headers = [base64.b64decode(item) for item in order["headers"]]
fd, count = os.open(order["path"], os.O_RDWR), 0
print(flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for header in headers:
        os.pwrite(fd, header, 0)
        count += 1
        time.sleep(random.random() * order["pause_s"])
print(count)
"""

_SWAP: Final = """
import ctypes, json, os, random, select, sys, time
libc = ctypes.CDLL(None, use_errno=True)
order = json.loads(sys.stdin.readline())
os.chdir(order["directory"])
count, fixed = 0, order["name"].encode()
print(flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for other in order["others"]:
        for _ in ("there", "back"):
            # RENAME_EXCHANGE: neither name is ever missing.
            count += libc.renameat2(-100, fixed, -100, other.encode(), 2) == 0
            time.sleep(random.random() * order["pause_s"])
print(count)
"""

_TAKE_TURNS: Final = """
import json, os, random, select, sys, time
order = json.loads(sys.stdin.readline())
os.chdir(order["directory"])
fixed, own, count, lost = order["name"], order["own"], 0, 0

def leads_to_own():
    try:
        return os.path.samestat(os.stat(own), os.stat(fixed))
    except FileNotFoundError:
        return False

def is_lost():
    # For a moment it may be away; nobody else has the right to take it away for good.
    until = time.monotonic() + 1
    while not leads_to_own():
        if time.monotonic() > until:
            return True
    return False

print(flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        os.link(own, fixed)
    except FileExistsError:
        pass
    else:
        count += 1
        time.sleep(random.random() * order["pause_s"])
        lost += order["keeps"] and is_lost()
    try:
        if os.stat(fixed).st_uid == os.getuid():
            os.unlink(fixed)
    except (FileNotFoundError, PermissionError):
        pass
    time.sleep(random.random() * order["pause_s"])
print(count, lost)
"""

PAUSE_S: Final = 0.002
"""At most so long between two changes: a conversion takes ten times that."""


@dataclass(slots=True)
class Count:
    """How often something was changed, once it is over."""

    changes: int = 0
    lost: int = 0


def rewriting(
    caller: Caller, path: Path, *headers: bytes
) -> contextlib.AbstractContextManager[Count]:
    """Write these over the beginning of a file in turn, as its owner."""
    encoded = [base64.b64encode(header).decode() for header in headers]
    return _going_on(caller, _REWRITE, path=str(path), headers=encoded)


def swapping(
    caller: Caller, directory: Path, name: str, *others: str
) -> contextlib.AbstractContextManager[Count]:
    """Exchange a name with each of the others and back again, all of them in one directory."""
    return _going_on(caller, _SWAP, directory=str(directory), name=name, others=others)


@contextlib.contextmanager
def taking_turns(
    directory: Path, name: str, first: tuple[Caller, str], second: tuple[Caller, str]
) -> Iterator[Count]:
    """Have two users in turn give their own file a name, and take it away again.

    Each has another name for its file, which stays. `changes` counts how often the second had the
    name; `lost`, how often somebody took it away from there for good.
    """
    orders = {"directory": str(directory), "name": name, "pause_s": PAUSE_S / 20}
    with (
        _going_on(first[0], _TAKE_TURNS, **orders, own=first[1], keeps=False),
        _going_on(second[0], _TAKE_TURNS, **orders, own=second[1], keeps=True) as count,
    ):
        yield count


@contextlib.contextmanager
def _going_on(caller: Caller, script: str, **order: object) -> Iterator[Count]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    count = Count()
    with caller.popen([PYTHON, "-I", "-c", script], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"pause_s": PAUSE_S, **order}).encode() + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        try:
            yield count
        finally:
            output, _ = process.communicate(timeout=waiting.DEADLINE_S)
            count.changes, count.lost = (*map(int, output.split()), 0)[:2]
