"""The command `convertd`: start the daemon, or check a policy."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Final

from convertd_daemon import __version__, channel
from convertd_daemon.broker import broker, front, listen, load, reach, selftest, startup, stderr
from convertd_daemon.kernel import prctl
from convertd_daemon.sandbox import errors as sandbox_errors
from convertd_daemon.sandbox import limits, narrow, seccomp
from convertd_daemon.sandbox.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.policy import Policy

log = logging.getLogger("convertd")

DEFAULT_SOCKET: Final = "/run/convertd/convertd.sock"


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and give its exit status."""
    asked = _parser().parse_args(arguments)
    if asked.command is not None:
        # Only here: the daemon has no use for what prints well.
        from convertd_daemon.broker import check  # noqa: PLC0415

        run = {"check": check.run, "unit-dropin": check.print_dropin}[asked.command]
        return run(asked.policy)
    stderr.log_to_it(logging.DEBUG if asked.verbose else logging.INFO)
    try:
        policy, socket = os.path.abspath(asked.policy), os.path.abspath(asked.socket)
        # Wherever it was started, that can be unmounted.
        os.chdir("/")
        return serve(policy, socket)
    except (
        startup.CantStart,
        load.LoadError,
        sandbox_errors.SandboxError,
        OSError,
    ) as error:
        sys.stderr.write(f"convertd: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convertd",
        description="Convert disk images for services that have no right to do it themselves.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["check", "unit-dropin"],
        help="explain a policy, or print what it needs of the service, and exit",
    )
    parser.add_argument(
        "--policy", default=load.DEFAULT_PATH, metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--socket",
        default=DEFAULT_SOCKET,
        metavar="PATH",
        help="where to listen, unless systemd passes a socket; default: %(default)s",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log each step")
    parser.add_argument("--version", action="version", version=f"convertd {__version__}")
    return parser


def serve(policy_path: str, socket_path: str) -> int:
    """Start, serve until told to stop, and give the exit status.

    Raises:
        CantStart, LoadError, SandboxError, OSError: the daemon can't start, and the one line why.
    """
    landlock_abi = startup.check_kernel()
    front_user, worker_user = startup.user(startup.FRONT_USER), startup.user(startup.WORKER_USER)
    loaded = load.load(policy_path)
    _warn(loaded)
    startup.check_program(loaded.policy.qemu_img)
    limits.raise_descriptors()
    limits.refuse_core_dumps()
    startup.check_descriptors(loaded.policy.limits)
    os.umask(0o077)
    with contextlib.ExitStack() as undo:
        listener = listen.listen(socket_path)
        undo.callback(listener.close)
        private = startup.private_directory(socket_path, front_user)
        undo.enter_context(startup.kept(private))
        names = startup.names_directory(socket_path)
        undo.enter_context(startup.kept(names))
        setup = Setup(
            path=loaded.policy.qemu_img,
            identity=worker_user,
            seccomp=seccomp.compile_profile(seccomp.QEMU_IMG),
            names=names,
        )
        narrow.narrow_broker()
        prctl.set_child_subreaper()
        # Now, for it loads gRPC while the self-test runs.
        first = front.start(front_user, private)
        undo.callback(first.end)
        tested = selftest.run(setup, private)
        household = broker.Household(
            listener=listener,
            private=private,
            front_user=front_user,
            setup=setup,
            versions=_versions(tested, landlock_abi),
            reload=_reloader(policy_path),
        )
        running = broker.Broker(household, loaded.policy)
        # What is here now stays: a collection would only copy pages that each job shares with us.
        gc.collect()
        gc.freeze()
        running.run(first)
    if running.failed:
        raise startup.CantStart(running.failed)
    return 0


def _versions(tested: selftest.SelfTest, landlock_abi: int) -> channel.Versions:
    return channel.Versions(
        daemon=__version__,
        qemu_img=tested.qemu_version,
        kernel=os.uname().release,
        landlock_abi=landlock_abi,
        compressions=tested.compressions,
        formats=tested.formats,
    )


def _reloader(path: str) -> Callable[[], Policy | str]:
    """Give what loads the policy anew: the new one, or why the old one stays."""

    def reload() -> Policy | str:
        try:
            loaded = load.load(path)
        except load.LoadError as error:
            log.error("policy not reloaded, the old one stays in force: %s", error)  # noqa: TRY400
            return str(error)
        _warn(loaded)
        log.info("policy reloaded file=%r", path)
        return loaded.policy

    return reload


def _warn(loaded: load.Loaded) -> None:
    for warning in (*loaded.warnings, *reach.problems(loaded.policy)):
        log.warning("%s", warning)
