"""From the outset to a broker that serves."""

from __future__ import annotations

import gc
import logging
import os
from typing import TYPE_CHECKING

from convertd_daemon import __version__, channel
from convertd_daemon.broker import broker, front, load, reach, selftest, startup
from convertd_daemon.sandbox import seccomp
from convertd_daemon.sandbox.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.broker.outset import Outset
    from convertd_daemon.policy import Policy

log = logging.getLogger("convertd")


def serve(policy_path: str, outset: Outset) -> None:
    """Read the policy, try qemu-img out, and serve until told to stop.

    Raises:
        CantStart, SandboxError, OSError: the daemon can't start, and the one line why.
    """
    # Not before: what Python compiles of our modules, others may read.
    os.umask(0o077)
    try:
        loaded = load.load(policy_path)
    except load.LoadError as error:
        raise startup.CantStart(str(error)) from error
    _warn(loaded)
    startup.check_program(loaded.policy.qemu_img)
    startup.check_descriptors(loaded.policy.limits)
    setup = Setup(
        path=loaded.policy.qemu_img,
        identity=outset.worker_user,
        seccomp=seccomp.compile_profile(seccomp.QEMU_IMG),
        names=outset.names,
    )
    tested = selftest.run(setup, outset.private)
    household = broker.Household(
        listener=outset.listener,
        private=outset.private,
        front_user=outset.front_user,
        setup=setup,
        versions=_versions(tested, outset.landlock_abi),
        reload=_reloader(policy_path),
    )
    running = broker.Broker(household, loaded.policy)
    # What is here now stays: a collection would only copy pages that each job shares with us.
    gc.collect()
    gc.freeze()
    running.run(front.Front(outset.front))
    if running.failed:
        raise startup.CantStart(running.failed)


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
    for warning in (*loaded.warnings, *reach.problems(loaded)):
        log.warning("%s", warning)
