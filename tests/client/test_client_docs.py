"""docs/client.md says what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import click
import pytest

from convertd_client import conversion, errors
from convertd_client.cli import commands

PAGE: Final = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next heading of the same rank or a higher one."""
    rank, _, rest = PAGE.partition(f"# {title}\n")
    marks = len(rank) - len(rank.rstrip("#")) + 1
    return re.split(rf"^#{{1,{marks}}} ", rest, flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """The first cell of each row of a section's tables."""
    return re.findall(r"^\| (`.*?)\s+(?<!\\)\|", text, flags=re.MULTILINE)


def test_client_page_lists_each_option_of_convert() -> None:
    """And none that there is not."""
    listed = {cell.strip("`") for cell in first_cells(section("Options of convert"))}
    assert listed == {*conversion.ConvertOptions.__optional_keys__, "dest_format"}


def test_client_page_lists_each_error() -> None:
    """By its class."""
    listed = {cell.strip("`") for cell in first_cells(section("Errors"))}
    classes = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ConvertError)
    }
    assert listed == classes - {"ConvertError"}


def test_client_page_lists_each_option_of_convertctl() -> None:
    """Long and short."""
    listed = set(re.findall(r"`(--?[a-zA-Z0-9-]+)", "\n".join(first_cells(section("convertctl")))))
    listed |= set(re.findall(r", `(--[a-z0-9-]+)", section("convertctl")))
    command = commands.convertctl.commands["convert"]
    options = {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }
    assert listed == options


def test_client_page_lists_each_command() -> None:
    """In its synopsis."""
    for name in commands.convertctl.commands:
        assert re.search(rf"^convertctl .*\b{name}\b", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_client_page_code_is_valid(code: str) -> None:
    """As far as can be seen without a daemon."""
    compile(code, "client.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
