"""From the first steps to a broker that serves."""

from __future__ import annotations

import gc
import logging
import os
from typing import TYPE_CHECKING

from convertd_core import results
from convertd_daemon import __version__
from convertd_daemon.broker import broker
from convertd_daemon.policy import load
from convertd_daemon.sandbox import seccomp
from convertd_daemon.sandbox.setup import Setup
from convertd_daemon.service import preflight, selftest, unit_limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from convertd_daemon.bootstrap import Bootstrap
    from convertd_daemon.policy.decide import Policy

log = logging.getLogger("convertd")


def serve(policy_path: str, bootstrap: Bootstrap) -> None:
    """Read the policy, try qemu-img out, and serve until told to stop.

    Raises:
        StartError, SandboxError, OSError: the daemon can't start, and the one line why.
    """
    # Not before: what Python compiles of our modules, others may read.
    os.umask(0o077)
    try:
        loaded = load.load(policy_path)
    except load.LoadError as error:
        raise preflight.StartError(str(error)) from error
    _warn(loaded)
    preflight.check_program(loaded.policy.qemu_img)
    preflight.check_descriptors(loaded.policy.limits)
    setup = Setup(
        path=loaded.policy.qemu_img,
        identity=bootstrap.worker_user,
        seccomp=seccomp.compile_profile(seccomp.QEMU_IMG),
        names=bootstrap.names,
    )
    tested = selftest.run(setup, bootstrap.private)
    config = broker.Config(
        listener=bootstrap.listener,
        private=bootstrap.private,
        front_user=bootstrap.front_user,
        setup=setup,
        versions=results.Versions(
            daemon=__version__,
            qemu_img=tested.qemu_version,
            landlock_abi=bootstrap.landlock_abi,
            kernel=os.uname().release,
        ),
        tested=tested,
        reload=_reloader(policy_path),
    )
    running = broker.Broker(config, loaded.policy)
    # What is here now stays: a collection would only copy pages that each job shares with us.
    gc.collect()
    gc.freeze()
    running.run(bootstrap.front)
    if running.failed:
        raise preflight.StartError(running.failed)


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
    for warning in (*loaded.warnings, *unit_limits.problems(loaded)):
        log.warning("%s", warning)
