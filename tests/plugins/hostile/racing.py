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

PAUSE_S: Final = 0.002
"""At most so long between two changes: a conversion takes ten times that."""


@dataclass(slots=True)
class Count:
    """How often something was changed, once it is over."""

    changes: int = 0


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
            said, _ = process.communicate(timeout=waiting.DEADLINE_S)
            count.changes = int(said)
