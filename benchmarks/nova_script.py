"""Calls Nova's own convert_image, which oslo.privsep's helper runs; commands as caller_script.py's.

This runs in an environment that has Nova. The helper runs as root. Once it has started,
this process takes the given uid.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import nova.privsep  # type: ignore[import-not-found]  # it has an environment of its own
import nova.privsep.qemu  # type: ignore[import-not-found]  # the same
from oslo_concurrency import processutils  # type: ignore[import-not-found]  # the same
from oslo_privsep import priv_context  # type: ignore[import-not-found]  # the same


def convert(arguments: list[Any]) -> float:
    """Convert one image; the arguments are those of convert_image."""
    began = time.monotonic()
    nova.privsep.qemu.convert_image(*arguments)
    return time.monotonic() - began


def concurrently(loads: list[list[list[Any]]]) -> dict[str, Any]:
    """Conversions in a thread for each load."""
    seconds: list[float] = []

    def work(calls: list[list[Any]]) -> None:
        seconds.extend(convert(arguments) for arguments in calls)

    threads = [threading.Thread(target=work, args=(calls,)) for calls in loads]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": seconds, "span": [began, time.monotonic()]}


COMMANDS: dict[str, Callable[[Any], Any]] = {"convert": convert, "concurrently": concurrently}


def execute(name: str, argument: Any) -> list[Any]:  # noqa: ANN401 - JSON is anything
    """Execute one command."""
    try:
        return [COMMANDS[name](argument), None]
    except processutils.ProcessExecutionError as error:
        return [None, str(error)]


def main(uid: int) -> None:
    """Start the helper, become that user, and execute commands until standard input ends."""
    nova.privsep.sys_admin_pctxt.start(priv_context.Method.FORK)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for line in sys.stdin:
        name, argument = json.loads(line)
        sys.stdout.write(json.dumps(execute(name, argument)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
