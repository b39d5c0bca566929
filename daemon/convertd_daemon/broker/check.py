"""`convertd check`: a policy in words, and whatever would keep it from working on this system."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import click

from convertd_daemon import model
from convertd_daemon.broker import description, load, startup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def run(policy_path: str = load.DEFAULT_PATH) -> int:
    """Say on stdout who may do what with whose rights, and on stderr what is wrong.

    Returns:
        The exit status: 1 if the daemon would not start, not take the policy, or leave out a part
        of it; else 0. A root that is not there is told, but may yet appear, and doesn't count.
    """
    try:
        loaded = load.load(policy_path)
    except load.LoadError as error:
        click.echo(error, err=True)
        return 1
    click.echo("\n".join(description.of(loaded)))
    problems = [*loaded.warnings, *missing_from_system(loaded.policy.qemu_img)]
    for problem in (*problems, *notes_on_roots(loaded)):
        click.echo(problem, err=True)
    return 1 if problems else 0


def missing_from_system(qemu_img: str) -> Iterator[str]:
    """Say what would keep the daemon from starting on this system, each with its remedy."""
    checks: tuple[Callable[[], object], ...] = (
        functools.partial(startup.user, startup.FRONT_USER),
        functools.partial(startup.user, startup.WORKER_USER),
        startup.check_kernel,
        functools.partial(startup.check_program, qemu_img),
    )
    for check in checks:
        try:
            check()
        except startup.CantStart as reason:
            yield str(reason)


def notes_on_roots(loaded: load.Loaded) -> Iterator[str]:
    """Say of each root what would keep its files from being opened, as things are now."""
    for root in loaded.policy.roots:
        if problem := _problem_of(root):
            yield f"{loaded.file}: roots.{root.name}.path: {root.path} {problem}"


def _problem_of(root: model.Root) -> str:
    if not os.path.lexists(root.path):
        return "is not there now: until it is, nothing in it can be opened"
    if not os.path.isdir(root.path):
        return "is not a directory"
    if root.kind is model.RootKind.FILES and os.path.realpath(root.path) != root.path:
        return "leads over a symbolic link, which is not followed"
    return ""
