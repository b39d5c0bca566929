"""Make one call with a client, as an order on standard input says, and print how it ended.

The order is JSON: kind ("sync" or "aio"), method, args, options, init, and stop_at, a phase at
which the caller raises an exception of its own. A program, since the tests' process must not load
gRPC.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from typing import Any

import convertd_client
from convertd_client import results


class CallerError(Exception):
    """An exception of the caller's own."""


def main() -> None:
    """Make the call."""
    order = json.load(sys.stdin)
    seen: list[results.Progress] = []

    def on_progress(progress: results.Progress) -> None:
        seen.append(progress)
        report({"phase": progress.phase})
        if progress.phase == order.get("stop_at"):
            raise CallerError
        if progress.phase == order.get("cancel_at"):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    if order["method"] == "convert":
        order["options"]["on_progress"] = on_progress
    began = time.monotonic()
    end: dict[str, Any]
    try:
        answer = call(order)
        end = {"value": _plain(answer)}
    except convertd_client.ConvertError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        end = {
            "error": kinds[0],
            "kinds": kinds,
            "reason": error.reason,
            "message": error.message,
            "metadata": dict(error.metadata),
        }
    except (CallerError, KeyboardInterrupt, asyncio.CancelledError) as error:
        end = {"error": type(error).__name__}
    end["seconds"] = time.monotonic() - began
    report(end)


def report(message: dict[str, Any]) -> None:
    """Tell the test something."""
    sys.stdout.write(json.dumps(message, default=str) + "\n")
    sys.stdout.flush()


def call(order: dict[str, Any]) -> object:
    """Make the call with the client that was asked for."""
    if order["kind"] == "aio":
        return asyncio.run(call_async(order))
    with convertd_client.Client(**order["init"]) as client:
        return getattr(client, order["method"])(*order["args"], **order["options"])


async def call_async(order: dict[str, Any]) -> object:
    """The same with asyncio; `cancel_after` cancels the task so many seconds later.

    Or `cancel_at`, at a phase: see main().
    """
    async with convertd_client.AsyncClient(**order["init"]) as client:
        method = getattr(client, order["method"])
        task = asyncio.ensure_future(method(*order["args"], **order["options"]))
        if "cancel_after" in order:
            asyncio.get_running_loop().call_later(order["cancel_after"], task.cancel)
        return await task


def _plain(answer: object) -> object:
    if isinstance(answer, tuple):
        return [_plain(item) for item in answer]
    assert dataclasses.is_dataclass(answer)
    assert not isinstance(answer, type)
    return dataclasses.asdict(answer)


main()
