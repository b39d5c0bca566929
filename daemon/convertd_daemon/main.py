"""The command `convertd`: start the daemon, or check a policy."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Final

from convertd_daemon import __version__, bootstrap
from convertd_daemon.sandbox import errors as sandbox_errors
from convertd_daemon.service import preflight, stderr_log

DEFAULT_POLICY: Final = "/etc/convertd/policy.toml"
DEFAULT_SOCKET: Final = "/run/convertd/convertd.sock"


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and give its exit status."""
    asked = command_line_parser().parse_args(arguments)
    if asked.command is not None:
        # Only here: the daemon has no use for what prints well.
        from convertd_daemon.admin import check  # noqa: PLC0415

        run = {"check": check.run, "unit-dropin": check.print_dropin}[asked.command]
        return run(asked.policy)
    stderr_log.log_to_it(logging.DEBUG if asked.verbose else logging.INFO)
    try:
        policy, socket = os.path.abspath(asked.policy), os.path.abspath(asked.socket)
        # Wherever it was started, that can be unmounted.
        os.chdir("/")
        with bootstrap.begin(socket) as begun:
            # Only now: the front loads gRPC while this loads.
            from convertd_daemon import serve  # noqa: PLC0415

            serve.serve(policy, begun)
    except (preflight.StartError, sandbox_errors.SandboxError, OSError) as error:
        sys.stderr.write(f"convertd: {error}\n")
        return 1
    return 0


def command_line_parser() -> argparse.ArgumentParser:
    """Make the parser of `convertd`."""
    parser = argparse.ArgumentParser(
        prog="convertd",
        description="Convert disk images for services that have no right to do it themselves.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["check", "unit-dropin"],
        help="check and explain a policy, or print its drop-in for the unit",
    )
    parser.add_argument(
        "--policy",
        default=DEFAULT_POLICY,
        metavar="FILE",
        help="the policy; default: %(default)s",
    )
    parser.add_argument(
        "--socket",
        default=DEFAULT_SOCKET,
        metavar="PATH",
        help="where to listen if systemd passes no socket; default: %(default)s",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log each step")
    parser.add_argument("--version", action="version", version=f"convertd {__version__}")
    return parser
