"""`convertd check`: explain a policy, and report what keeps it from working on this system."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
from typing import TYPE_CHECKING, Final

import click

from convertd_core import values
from convertd_daemon.admin import describe, dropin
from convertd_daemon.policy import load, path_walk, survey, writers
from convertd_daemon.service import preflight

UNIT: Final = "convertd.service"

SYSTEMCTL: Final = "/usr/bin/systemctl"

PROPERTIES: Final = (
    "DeviceAllow",
    "LoadState",
    "NeedDaemonReload",
    "PrivateDevices",
    "PrivateTmp",
    "ProtectHome",
    "ProtectSystem",
    "ReadWritePaths",
    "RestrictSUIDSGID",
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def run(policy_path: str) -> int:
    """Say on stdout who may do what with whose rights, and on stderr what is wrong.

    Returns:
        The exit status: 1 if the daemon would not start, not take the policy, or leave out a part
        of it; else 0. A missing root is reported, but may yet appear, and doesn't count.
    """
    try:
        loaded = load.load(policy_path)
    except load.LoadError as error:
        click.echo(error, err=True)
        return 1
    click.echo("\n".join(describe.of(loaded)))
    problems = [
        *loaded.warnings,
        *missing_from_system(loaded.policy.qemu_img),
        *beyond_the_unit(loaded),
        *of_counters_file(loaded),
    ]
    for problem in (*problems, *notes_on_roots(loaded), *notes_on_counters_file(loaded)):
        click.echo(problem, err=True)
    return 1 if problems else 0


def print_dropin(policy_path: str) -> int:
    """Print the drop-in that a policy needs.

    Returns:
        The exit status: 1 if the policy can't be loaded.
    """
    try:
        loaded = load.load(policy_path)
    except load.LoadError as error:
        click.echo(error, err=True)
        return 1
    click.echo(dropin.text(dropin.needs_of(loaded.policy), loaded.file), nl=False)
    return 0


def beyond_the_unit(loaded: load.Loaded) -> Iterator[str]:
    """Say what the policy grants and the installed unit, with its drop-ins, does not allow."""
    unit = unit_properties()
    if unit.get("LoadState") != "loaded":
        return
    beyond = list(dropin.uncovered(dropin.needs_of(loaded.policy), unit))
    yield from (f"{UNIT}: {problem}" for problem in beyond)
    if beyond:
        yield f"{UNIT}: `convertd unit-dropin` prints what is missing, and says where to put it"
    if unit.get("NeedDaemonReload") == "yes":
        yield f"{UNIT}: changed since systemd read it; run: systemctl daemon-reload"


def unit_properties() -> Mapping[str, str]:
    """The properties of our unit; none where systemd does not answer."""
    try:
        shown = subprocess.run(
            [SYSTEMCTL, "show", UNIT, f"--property={','.join(PROPERTIES)}"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def missing_from_system(qemu_img: str) -> Iterator[str]:
    """Say what would keep the daemon from starting on this system, each with its remedy."""
    checks: tuple[Callable[[], object], ...] = (
        functools.partial(preflight.user, preflight.FRONT_USER),
        functools.partial(preflight.user, preflight.WORKER_USER),
        preflight.check_kernel,
        functools.partial(preflight.check_program, qemu_img),
    )
    for check in checks:
        try:
            check()
        except preflight.StartError as reason:
            yield str(reason)


def of_counters_file(loaded: load.Loaded) -> Iterator[str]:
    """Say why the counters could not be written, or who else could replace them."""
    path = loaded.policy.service.metrics
    if not path:
        return
    directory = os.path.dirname(path)
    with contextlib.ExitStack() as stack:
        try:
            *_, last = path_walk.steps(directory, stack)
        except OSError as error:
            yield f"{loaded.file}: service.metrics: {path_walk.reason(error)}"
            return
        if others := writers.of(last):
            yield f"{loaded.file}: service.metrics: {others}, who could so replace the counters"
    if os.path.isdir(path):
        yield f"{loaded.file}: service.metrics: {path} is a directory"


def notes_on_counters_file(loaded: load.Loaded) -> Iterator[str]:
    """Say of each directory above that of the counters who else than root could rename it.

    The daemon follows no link that they put there, and waits for nobody: it is told and no more,
    for Debian's own directory for such files is below one of its user prometheus.
    """
    if not loaded.policy.service.metrics:
        return
    above = os.path.dirname(os.path.dirname(loaded.policy.service.metrics))
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        for step in path_walk.steps(above, stack):
            if others := writers.of(step, below_uid=0):
                yield f"{loaded.file}: service.metrics: {others}, who could so replace the counters"


def notes_on_roots(loaded: load.Loaded) -> Iterator[str]:
    """Say of each root what would keep its files from being opened, as things are now."""
    for root in loaded.policy.roots:
        if problem := _problem_of(root, loaded.seen[root.name]):
            yield f"{loaded.file}: roots.{root.name}.path: {root.path} {problem}"


def _problem_of(root: values.Root, seen: survey.Seen) -> str:
    error = seen.error
    if error == errno.ELOOP and root.kind is values.RootKind.BLOCK:
        # Names of devices are udev's links, and are followed.
        error = 0 if os.path.isdir(root.path) else errno.ENOTDIR
    if error == errno.ENOENT and root.kind is values.RootKind.FILE:
        return "does not exist: create it, then restart convertd.service"
    return _PROBLEMS.get(error, f"can't be opened: {os.strerror(error)}")


_PROBLEMS: Final = {
    0: "",
    survey.SILENT: "does not answer, so nothing in it can be opened",
    errno.ENOENT: "does not exist now, so nothing in it can be opened",
    errno.ENOTDIR: "is not a directory",
    errno.ELOOP: "has a symbolic link in its path, which is not followed",
}
