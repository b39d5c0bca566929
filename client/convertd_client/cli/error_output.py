"""Print errors and warnings for people: one line, and a hint if there is one."""

from __future__ import annotations

from typing import Final

import click

from convertd_client import errors, results
from convertd_client.cli import text

HINTS: Final = {
    "PERMISSION_DENIED": "`convertctl access` shows what you may do",
    "FORMAT_NOT_ALLOWED": "`convertctl access` shows what you may do",
    "DEST_EXISTS": "--overwrite replaces it",
    "FORMAT_MISMATCH": "`convertctl info` without -f finds the format out",
    "AMBIGUOUS_FORMAT": "-f FORMAT states the format",
    "SECRET_MISSING": "give the passphrase with --source-secret-file",
    "IMAGE_DAMAGED": "--accept-damaged converts it as it is",
    "REFLINK_NOT_POSSIBLE": "--reflink auto copies instead",
    "JOB_NOT_FOUND": "`convertctl jobs` lists your jobs",
    "QUEUE_FULL": "`convertctl jobs` shows what runs and waits; try again later",
    "DEST_BUSY": "`convertctl jobs` shows the job that writes it",
    "SOCKET_MISSING": "`systemctl status convertd.socket` tells more; "
    "--local converts with your own rights, without the daemon",
    "CONNECTION_REFUSED": "`systemctl status convertd.socket convertd.service` tells more",
    "NOT_ANSWERING": "`systemctl status convertd.service` tells more",
    "INTERNAL_ERROR": "the daemon's log has more: `journalctl -u convertd`",
    "TIMEOUT": "the destination is complete or not there",
    "PUBLISHED_BUT_NOT_DURABLE": "run `sync` when the disk works again, to make it durable",
}

LOCAL_HINTS: Final = {
    "DEST_EXISTS": HINTS["DEST_EXISTS"],
    "FORMAT_MISMATCH": "`convertctl info --local` without -f finds the format out",
    "SECRET_MISSING": HINTS["SECRET_MISSING"],
    "IMAGE_DAMAGED": HINTS["IMAGE_DAMAGED"],
    "REFLINK_NOT_POSSIBLE": HINTS["REFLINK_NOT_POSSIBLE"],
    "TIMEOUT": HINTS["TIMEOUT"],
    "PUBLISHED_BUT_NOT_DURABLE": HINTS["PUBLISHED_BUT_NOT_DURABLE"],
}
"""The hints without a daemon, where there is no policy, no list of jobs, and no log."""

DAEMONS_RIGHTS: Final = (
    "the daemon has no right to it: as root, `convertd check` shows what the service needs"
)
OWN_RIGHTS: Final = "the daemon opens files there with your own rights; see `convertctl access`"

LOOK_FIRST: Final = "check whether the destination exists before you try again"


def say(error: errors.ConvertError, *, is_local: bool = False) -> None:
    """Print an error. `is_local` is for a call without the daemon."""
    warn(f"{error.message} ({error.reason})")
    hint = _hint(error, is_local=is_local)
    if hint is not None:
        click.echo(f"  {hint}", err=True)


def _hint(error: errors.ConvertError, *, is_local: bool) -> str | None:
    """The hint for an error, if there is one; it also depends on whose rights were used."""
    if isinstance(error, errors.OutcomeUnknown):
        return LOOK_FIRST
    if is_local:
        return LOCAL_HINTS.get(error.reason)
    if error.reason == "ACCESS_REFUSED":
        return DAEMONS_RIGHTS if error.metadata.get("rights") == "the daemon" else OWN_RIGHTS
    return HINTS.get(error.reason)


def say_misused(error: click.ClickException) -> None:
    """Print the error in a command line."""
    warn(" ".join(error.format_message().split()))
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(f"  `{error.ctx.command_path} --help` shows the usage", err=True)


def warn_of(notices: tuple[results.Warning, ...]) -> None:
    """Print the warnings of a call that succeeded."""
    for notice in notices:
        warn(f"warning: {notice.message} ({notice.reason})")


def warn(message: str) -> None:
    """Print one line to standard error."""
    click.echo(f"convertctl: {text.shown(message)}", err=True)
