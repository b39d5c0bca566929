"""convertctl's options for the creation of DEST: those of its format, by qemu's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from convertd_client.cli import values
from convertd_core import creation_options

Command = TypeVar("Command", bound=Callable[..., Any])


def _complete_subformat(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the subformats of the stated format, or of all formats if none is stated yet."""
    stated = ctx.params.get("dest_format")
    kinds = [
        options["subformat"]
        for name, options in creation_options.OPTIONS.items()
        if "subformat" in options and stated in {None, name}
    ]
    offered = dict.fromkeys(choice for kind in kinds for choice in kind.known)
    return [CompletionItem(choice) for choice in offered if choice.startswith(incomplete)]


def _size(name: str, text: str) -> Callable[[Command], Command]:
    callback = values.parsed(values.parse_size)
    return click.option(name, metavar="SIZE", callback=callback, help=text)


def _flag(name: str, text: str) -> Callable[[Command], Command]:
    return click.option(name, is_flag=True, help=text)


_OPTIONS: Final = (
    click.option(
        "--subformat",
        metavar="NAME",
        shell_complete=_complete_subformat,
        help="Of vmdk: such as streamOptimized. Of vpc and vhdx: dynamic or fixed.",
    ),
    _size("--cluster-size", "Of qcow2, qed and parallels: such as 64K."),
    click.option(
        "--compat",
        type=click.Choice(creation_options.OPTIONS["qcow2"]["compat"].choices),
        help="Of qcow2: the version of the format.",
    ),
    _flag("--lazy-refcounts", "Of qcow2: postpone updates of reference counts."),
    click.option("--refcount-bits", type=int, metavar="N", help="Of qcow2: 1 to 64."),
    _flag("--extended-l2", "Of qcow2: use subclusters."),
    click.option(
        "--adapter-type",
        type=click.Choice(creation_options.OPTIONS["vmdk"]["adapter_type"].choices),
        help="Of vmdk: the disk adapter.",
    ),
    click.option(
        "--hwversion", type=int, metavar="N", help="Of vmdk: the version of the virtual hardware."
    ),
    _flag("--zeroed-grain", "Of vmdk: mark zeroes in grain-table entries."),
    _flag("--static", "Of vdi: allocate every block in advance."),
    _size("--block-size", "Of vhdx: such as 8M."),
    _size("--log-size", "Of vhdx: such as 1M."),
    click.option("--table-size", type=int, metavar="N", help="Of qed: clusters in a table."),
    click.option(
        "--target-is-zero",
        "is_zero",
        is_flag=True,
        help="DEST is a device that reads as zeroes everywhere.",
    ),
)


def options(command: Command) -> Command:
    """Add these options to a command, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
