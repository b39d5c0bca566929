"""qemu-img itself, where it makes an encrypted image for a test."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

NOT_MEASURED: Final = "Unable to get accurate CPU usage"
"""What it ends with if the kernel has counted none of its work as user time: on a busy machine.

It counts how many hashes take a second of getrusage(2)'s user time, which the kernel estimates from
samples. One of 15 failed at a load of 20 on two processors (measured 2026-11).
"""

ATTEMPTS: Final = 20


def qemu_img(*argv: str | Path) -> None:
    """Run it to its success, anew where it could not measure its processor time."""
    said = NOT_MEASURED
    for _ in range(ATTEMPTS):
        if NOT_MEASURED not in said:
            break
        done = subprocess.run(["qemu-img", *argv], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return
        said = done.stderr
    raise AssertionError(said)
