"""The commands in code blocks of README and docs/ are such as their programs accept.

As far as that can be told without running them. `make check` runs this file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import click
import markdown_it
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2

from convertd.v1 import convert_pb2
from convertd_client.cli import commands

ROOT: Final = Path(__file__).parents[2]
UNITS: Final = ROOT / "packaging/systemd"
CONTRACTS: Final = {"convertd.v1": convert_pb2, "grpc.health.v1": health_pb2}

Words = Sequence[str]


class WrongCommandError(Exception):
    """A command that its program would refuse."""


def parsed_by_convertctl(words: Words) -> None:
    """Options, values and the number of arguments, by the command's own parser."""
    group = commands.convertctl
    context = click.Context(group)
    try:
        _, rest, _ = group.make_parser(context).parse_args(list(words))
        if rest:
            command = group.get_command(context, rest[0])
            if command is None:
                raise WrongCommandError(rest[0])
            command.make_context(rest[0], rest[1:], parent=context)
    except click.exceptions.Exit:
        return  # it was asked for its help
    except click.ClickException as error:
        raise WrongCommandError(error.format_message()) from error


def parsed_by_convertd(words: Words) -> None:
    """The same, for the daemon's."""
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="convertd")
    parser = importlib.import_module(command.module).command_line_parser()
    try:
        parser.parse_args(list(words))
    except SystemExit as end:
        require(end.code == 0, words)


def known_to_make(words: Words) -> None:
    """Each target, and each variable that is set."""
    phony, database = make_database()
    for word in words:
        name, is_set, _ = word.partition("=")
        if is_set:
            require(re.search(rf"^{name} :?= ?", database, re.MULTILINE), name)
        else:
            require(name in phony, name)


@functools.cache
def make_database() -> tuple[set[str], str]:
    """The phony targets of the Makefile, and all that make knows."""
    # Not as a part of the make that may run the tests.
    command = ("env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", "make", "--directory", str(ROOT))
    database = output_of(*command, "--question", "--print-data-base")
    return set(re.findall(r"^\.PHONY: (.*)$", database, re.MULTILINE)[0].split()), database


def known_to_systemctl(words: Words) -> None:
    """The verb and the options, by systemctl's help. A unit of ours is one that is installed."""
    known = set(
        re.findall(r"^ +(?:-\w )?([a-z-]+)", output_of("systemctl", "--help"), re.MULTILINE)
    )
    verb, *others = [word for word in words if not word.startswith("-")]
    for word in (verb, *(word for word in words if word.startswith("-"))):
        require(word in known, word)
    for unit in others:
        name = unit if "." in unit else f"{unit}.service"
        require((UNITS / name).exists(), unit)


def described_by_the_contract(words: Words) -> None:
    """The symbol that grpcurl is given is in the contract, and its data are such a request."""
    symbol = words[-1]
    try:
        if "describe" in words:
            convert_pb2.DESCRIPTOR.pool.FindFileContainingSymbol(symbol)
        elif symbol != "list":
            package, _, path = symbol.rpartition(".")
            contract = CONTRACTS[package]
            service, _, name = path.partition("/")
            method = contract.DESCRIPTOR.services_by_name[service].methods_by_name[name]
            data = words[words.index("-d") + 1] if "-d" in words else "{}"
            json_format.Parse(data, getattr(contract, method.input_type.name)())
    except (KeyError, json_format.ParseError) as error:
        raise WrongCommandError(str(error)) from error


def known_to_qemu_img(words: Words) -> None:
    """The command, and its options, by qemu-img's help."""
    command, *rest = words
    usage = re.search(
        rf"^  {re.escape(command)} (.*)$", output_of("qemu-img", "--help"), re.MULTILINE
    )
    if usage is None:
        raise WrongCommandError(command)
    for word in rest:
        if word.startswith("-"):
            require(re.search(rf"(?<!\S)\W?{word.partition('=')[0]}\b", usage[1]), word)


CHECKS: Final[dict[str, Callable[[Words], None]]] = {
    "convertctl": parsed_by_convertctl,
    "convertd": parsed_by_convertd,
    "grpcurl": described_by_the_contract,
    "make": known_to_make,
    "qemu-img": known_to_qemu_img,
    "systemctl": known_to_systemctl,
}
BEGINNING: Final = re.compile(rf"(?:[$#] )?((?:{'|'.join(CHECKS)})(?: \S.*|))$")


def check(command: str) -> None:
    """Have its program's check look at a command.

    Raises:
        WrongCommandError: the program would refuse it.
    """
    program, *words = words_of(command)
    CHECKS[program](words)


def words_of(command: str) -> list[str]:
    """Split a command as a shell does, up to a pipe or a redirection; with all that is optional."""
    if command.startswith("convert"):
        command = re.sub(r"\[options\]|[][]", "", command)
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    return words[: next((at for at, word in enumerate(words) if set(word) <= set("|<>&;")), None)]


def require(fact: object, what: object) -> None:
    """Refuse a command unless something is so."""
    if not fact:
        raise WrongCommandError(f"no such thing: {what}")


@functools.cache
def output_of(*command: str) -> str:
    """Run a program that only says what it knows."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def shown_in(text: str) -> Iterator[tuple[int, str]]:
    """Each command in the code blocks of a page, with its line. Some go on in the next."""
    for block in markdown_it.MarkdownIt().parse(text):
        if block.type not in {"code_block", "fence"} or block.map is None:
            continue
        first = block.map[0] + 1 + (block.type == "fence")
        lines = iter(enumerate(block.content.splitlines(), first))
        for number, line in lines:
            if begun := BEGINNING.match(line.strip()):
                command = begun[1]
                while command.endswith("\\") or command.count("'") % 2:
                    command = command.removesuffix("\\") + "\n" + next(lines)[1]
                yield number, command


PAGES: Final = sorted(
    page.relative_to(ROOT) for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
SHOWN: Final = {
    f"{page}:{line}": command
    for page in PAGES
    for line, command in shown_in((ROOT / page).read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("command", SHOWN.values(), ids=SHOWN)
def test_documented_command_is_valid(command: str) -> None:
    """For whoever copies it."""
    check(command)


def test_documented_commands_cover_each_program() -> None:
    """Or the test above would no longer find them."""
    programs = [command.split()[0] for command in SHOWN.values()]
    assert len(programs) > 30
    assert set(programs) >= CHECKS.keys() - {"qemu-img"}


RIGHT: Final = (
    "convertctl [--socket PATH] info PATH [-f FORMAT] [--json]",
    "convertctl completion bash|zsh|fish",
    "convertctl --version",
    "convertctl convert a.raw b.qcow2 -O qcow2 --rate-limit 50M > log",
    "convertd unit-dropin --policy FILE > policy.conf",
    "make install DESTDIR=/image PREFIX=/usr  # copies the files",
    "systemctl enable --now convertd.socket",
    "grpcurl -plaintext -unix /socket grpc.health.v1.Health/Check",
    "qemu-img convert -O qcow2 -c a.raw b.qcow2",
)

WRONG: Final = (
    "convertctl convert a.raw b.qcow2 -O qcow2 --compresion zstd",
    "convertctl convert a.raw b.qcow2 -O qcow2 --compression lzma",
    "convertctl convert a.raw -O qcow2",
    "convertctl convert a.raw b.qcow2",
    "convertctl transform a.raw b.qcow2",
    "convertctl --sockets PATH jobs",
    "convertd explain",
    "convertd check --police FILE",
    "make tests",
    "make test PYTEST_FLAG=-x",
    "systemctl activate convertd.socket",
    "systemctl enable --nov convertd.socket",
    "systemctl enable convertd.sock",
    "grpcurl -plaintext -unix /socket convertd.v1.ConvertService/Transform",
    "grpcurl -plaintext -unix /socket describe convertd.v1.Target",
    "grpcurl -plaintext -d '{\"from\": {}}' -unix /socket convertd.v1.ConvertService/Convert",
    "qemu-img transform a.raw b.qcow2",
    "qemu-img convert -X qcow2 a.raw b.qcow2",
)


@pytest.mark.parametrize("command", RIGHT)
def test_valid_command_passes_the_check(command: str) -> None:
    """In each way in which a page may show one."""
    check(command)


@pytest.mark.parametrize("command", WRONG)
def test_invalid_command_fails_the_check(command: str) -> None:
    """Each program's check can fail."""
    page = f"Text.\n\n```console\n$ {command}\n```\n"
    ((line, shown),) = shown_in(page)
    assert line == 4
    with pytest.raises(WrongCommandError):
        check(shown)
