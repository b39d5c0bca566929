"""Parse the values of convertctl's options: sizes, times, modes, formats, secrets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import click
from click.shell_completion import CompletionItem

from convertd_core import validation

Value = TypeVar("Value")

PATH: Final = click.Path(readable=False)
"""Shells complete it as a path. click does not check it: the daemon does."""

FORMATS: Final = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "luks", "dmg")
"""For completion only: the daemon decides which formats there are."""


_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)(?:/s)?", re.IGNORECASE | re.ASCII)
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", re.IGNORECASE | re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """A number of bytes: `50M` and `50MiB` are 50 * 1024², as for qemu-img; `50MB` is 50 * 1000².

    Raises:
        ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3].lower() in {"i", "ib"} and not match[2]):
        raise ValueError(f"{text!r} is not a size such as 1048576, 50M or 1GiB")
    base = 1000 if match[2] and match[3].lower() == "b" else 1024
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def parse_time(text: str) -> float:
    """A number of seconds: `90`, `90s`, `10m`, `2h`, `1d`.

    Raises:
        ValueError: the text is not a time, or it is 0.
    """
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[(match[2] or "s").lower()] if match else 0.0
    if not seconds:
        raise ValueError(f"{text!r} is not a time such as 90s, 10m or 2h")
    return seconds


def parse_mode(text: str) -> int:
    """Permission bits, in octal.

    Raises:
        ValueError: the text is not three octal digits, with or without a leading 0.
    """
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError(f"{text!r} is not a mode such as 0640")
    return int(text, 8)


def read_secret(path: str) -> bytes:
    """Read a passphrase from a file: every byte of it, as qemu-img does.

    Raises:
        ValueError: the file can't be read, is empty, or is too long.
    """
    try:
        with open(path, "rb") as file:
            secret = file.read(validation.MAX_PASSPHRASE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path!r}: {error.strerror}") from error
    if not 1 <= len(secret) <= validation.MAX_PASSPHRASE_BYTES:
        raise ValueError(f"{path!r} has not 1 to {validation.MAX_PASSPHRASE_BYTES} bytes")
    return secret


def parsed(
    parse: Callable[[str], Value],
) -> Callable[[click.Context, click.Parameter, str | None], Value | None]:
    """Make an option's callback that parses the given text, if there is one."""

    def callback(ctx: click.Context, param: click.Parameter, typed: str | None) -> Value | None:
        try:
            return None if typed is None else parse(typed)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return callback


def complete_format(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the names of formats."""
    return [CompletionItem(name) for name in FORMATS if name.startswith(incomplete)]
