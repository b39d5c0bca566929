"""A pytest plugin: the fixtures of whatever tests the whole daemon.

A module that uses `daemon` has its policy in `POLICY`. There {scratch} and {library} stand for two
directories, and {volumes} for one of block devices. The roots in it are created.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import loop_devices
import pytest
from loop_devices import Devices
from policies import Policy

from harness import daemon as daemons
from harness import images
from harness.daemon import Daemon
from harness.mounts import Mounts

FillPolicy = Callable[[Policy | str], str]
MakeDaemon = Callable[[Policy | str], Daemon]

_LOG_CHARACTERS = 20_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the daemons had to say."""
    report = yield
    if report.failed:
        report.sections += [
            (f"daemon {one.home}", one.log[-_LOG_CHARACTERS:]) for one in daemons.LIVE
        ]
    return report


def _directory(prefix: str) -> Path:
    """A directory on a real file system, which all may enter and root alone write."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/var/lib"))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory for a module's roots."""
    path = _directory("convertd-test-")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def library() -> Iterator[Path]:
    """Images that many tests read, root's own: small.raw, small.qcow2, slow.raw and bulky.raw."""
    path = _directory("convertd-test-library-")
    small = images.small(path / "small.raw")
    images.converted(small, path / "small.qcow2", "qcow2")
    images.slow(path / "slow.raw")
    images.bulky(path / "bulky.raw")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def mounts(scratch: Path) -> Iterator[Mounts]:
    """File systems, mounted in `scratch`."""
    with Mounts(scratch) as made:
        yield made


@pytest.fixture(scope="module")
def volumes(scratch: Path) -> Iterator[Devices]:
    """A directory for volumes."""
    with loop_devices.made(scratch) as made:
        yield made


@pytest.fixture(scope="module")
def fill_in(request: pytest.FixtureRequest, scratch: Path, library: Path) -> FillPolicy:
    """Put the directories into a policy, and create those of its roots that are missing."""

    def fill(policy: Policy | str) -> str:
        text = str(policy).replace("{scratch}", str(scratch)).replace("{library}", str(library))
        if "{volumes}" in text:
            made: Devices = request.getfixturevalue("volumes")
            text = text.replace("{volumes}", str(made.links))
        roots = tomllib.loads(text).get("roots", {}).values()
        for path in sorted(root["path"] for root in roots):  # one in another comes after that
            Path(path).mkdir(mode=0o755, exist_ok=True)
        return text

    return fill


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest, fill_in: FillPolicy) -> Iterator[Daemon]:
    """The module's daemon. When the module is done it is stopped, and must leave nothing."""
    one = Daemon(fill_in(request.module.POLICY))
    with contextlib.ExitStack() as undo:
        undo.callback(one.discard)
        one.start()
        yield one
        one.await_idle()
        one.stop()


@pytest.fixture
def make_daemon(fill_in: FillPolicy) -> Iterator[MakeDaemon]:
    """Make daemons for one test alone, not started yet.

    What runs at its end is stopped, and must leave nothing.
    """
    made: list[Daemon] = []
    with contextlib.ExitStack() as undo:

        def make(policy: Policy | str) -> Daemon:
            one = Daemon(fill_in(policy))
            undo.callback(one.discard)
            made.append(one)
            return one

        yield make
        for one in made:
            if one.is_running:
                one.stop()


_NUMBERS = itertools.count(1)


@pytest.fixture
def images_dir(scratch: Path) -> Path:
    """A directory of the test's own in the root `images`. It is root's."""
    path = scratch / "images" / f"test-{next(_NUMBERS)}"
    path.mkdir(parents=True, mode=0o755)
    return path
