"""`convertctl convert`: one conversion, by the daemon or without it."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from typing import Protocol

import click

import convertd_client
from convertd_client import conversion, errors, results
from convertd_client.cli import (
    error_output,
    json_output,
    progress,
    render,
    signals,
)

JOB_ID_WAIT_S = 2.0
"""How long to wait for the id of a job that is to be cancelled: less than PATIENCE_S."""


class Running(Protocol):
    """A conversion that can be run once, and cancelled from another thread."""

    def run(
        self, on_progress: Callable[[results.Progress], None] | None, timeout_s: float | None
    ) -> results.ConvertResult:
        """Convert, and wait for the end."""

    def cancel(self) -> None:
        """Cancel the conversion. `run` returns or raises how it ended."""


class Remote:
    """A conversion by the daemon."""

    def __init__(
        self,
        client: convertd_client.Client,
        paths: tuple[str, str],
        dest_format: str,
        options: conversion.ConvertOptions,
    ) -> None:
        self._client = client
        self._source, self._dest = paths
        self._dest_format = dest_format
        self._options = options
        self._job_id = ""
        self._has_job = threading.Event()

    def run(
        self, on_progress: Callable[[results.Progress], None] | None, timeout_s: float | None
    ) -> results.ConvertResult:
        """Convert, and wait for the end."""

        def note_job(report: results.Progress) -> None:
            self._job_id = report.job_id
            self._has_job.set()
            if on_progress is not None:
                on_progress(report)

        return self._client.convert(
            self._source,
            self._dest,
            dest_format=self._dest_format,
            on_progress=note_job,
            timeout=timeout_s,
            **self._options,
        )

    def cancel(self) -> None:
        """Cancel the job, if the daemon reports its id soon; else the caller must leave `run`."""
        if self._has_job.wait(JOB_ID_WAIT_S):
            self._client.cancel(self._job_id, timeout=signals.PATIENCE_S)


def run(running: Running, dest: str, *, overwrite: bool, timeout_s: float | None) -> None:
    """Run a conversion, show its progress, and end the program with its outcome."""
    context = click.get_current_context()
    as_json, quiet = bool(context.meta.get("json")), bool(context.params["quiet"])
    with signals.Stopping(running.cancel) as stop:
        try:
            with progress.shower(as_json=as_json, quiet=quiet) as show:
                done = running.run(show, timeout_s)
        except errors.Cancelled as error:
            if stop.signal is None:
                raise
            _say_cancelled(error, dest, as_json=as_json, overwrite=overwrite)
            context.exit(stop.status)
        except KeyboardInterrupt:
            _say_left(dest, as_json=as_json)
            context.exit(stop.status)
    if as_json:
        json_output.line(done, "result")
    elif not quiet:
        render.result(dest, done)
        if done.plan is not None and not done.published:
            render.plan(done.plan)
    error_output.warn_of(() if as_json else done.warnings)


def _say_cancelled(error: errors.Cancelled, dest: str, *, as_json: bool, overwrite: bool) -> None:
    if as_json:
        json_output.error_line(error)
    elif _is_device(dest):
        error_output.warn(
            f"cancelled; if writing had begun, the content of {dest} is undefined now"
        )
    elif overwrite:
        error_output.warn(f"cancelled; {dest} is as it was")
    else:
        error_output.warn(f"cancelled; nothing was left at {dest}")


def _say_left(dest: str, *, as_json: bool) -> None:
    """Print what is certain when convertctl stops waiting for the job's end."""
    text = f"stopped waiting; the job is being cancelled, and a file {dest} is whole or not there"
    if as_json:
        json_output.error_line(errors.OutcomeUnknown(text, reason="INTERRUPTED"))
    else:
        error_output.warn(text)


def _is_device(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(os.stat(path).st_mode)
    return False
