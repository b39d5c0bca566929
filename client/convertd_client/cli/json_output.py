"""The output of `--json`: one object per line, a stable interface for programs.

The keys are the names of `results` and of the contract.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping

import click

from convertd_client import errors


def line(value: object, event: str | None = None) -> None:
    """Print a value as one line."""
    plain = _plain(value)
    if event is not None and isinstance(plain, dict):
        plain = {"event": event, **plain}
    # DEL is the only control character that json does not escape.
    click.echo(json.dumps(plain).replace("\x7f", "\\u007f"))


def error_line(error: errors.ConvertError) -> None:
    """Print an error as one line."""
    fields = {
        "status": error.status,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
    }
    line(fields, "error")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return value
