"""What the tests of the sandbox share."""

from __future__ import annotations

import os
import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest
from compromised import WORKER, CompromisedProgram

from convertd_daemon.sandbox import (
    landlock,
    limits,
    seccomp,
    spawn,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def compiled() -> bytes:
    """Give qemu-img's filter."""
    return seccomp.compile_profile(seccomp.QEMU_IMG)


@pytest.fixture
def qemu_img() -> Iterator[int]:
    """Give qemu-img, open for reading."""
    descriptor = os.open("/usr/bin/qemu-img", os.O_RDONLY | os.O_CLOEXEC)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def compromised(compiled: bytes) -> Iterator[CompromisedProgram]:
    """Give a Python in the sandbox of qemu-img, with nothing but its own standard library."""
    library = sysconfig.get_path("stdlib")
    program = os.open(os.path.realpath(sys.executable), os.O_RDONLY | os.O_CLOEXEC)
    # READ_DIR too: importlib lists the directories that it finds modules in.
    rules = (landlock.Rule(where=library, access=landlock.READ_BENEATH),)
    yield CompromisedProgram(
        program=program,
        confinement=spawn.Confinement(
            identity=WORKER,
            filter=compiled,
            extra=rules,
            limits=limits.INFO,
        ),
    )
    os.close(program)
