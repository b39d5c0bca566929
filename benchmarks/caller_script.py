"""Calls the daemon as the user who runs this. Reads commands on standard input, a JSON array each.

Each is answered by a line: the result and null, or null and an error. Times are taken here, around
the call, by the clock that all processes share. Nothing of the benchmarks is imported: this runs
with `python -I`, and the file is handed over by `-c`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from convertd_client import Client, errors

TIMEOUT_S = 600

clients: list[Client] = []
stopping = threading.Event()


def client(socket: str, number: int = 0) -> Client:
    """The connection of that number, made at its first use."""
    while len(clients) <= number:
        clients.append(Client(socket))
    return clients[number]


def timed(act: Callable[[], object]) -> float:
    """Measure how long a function takes."""
    began = time.monotonic()
    act()
    return time.monotonic() - began


def convert(socket: str, call: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """Convert one image; returns how long it took, and the method."""
    one = client(socket, number)
    began = time.monotonic()
    result = one.convert(call["source"], call["dest"], timeout=TIMEOUT_S, **call["options"])
    return {"seconds": time.monotonic() - began, "method": result.method}


def timeline(socket: str, call: dict[str, Any]) -> list[float]:
    """Convert, and return its start and end, by the real-time clock."""
    one = client(socket)
    began = time.time()
    one.convert(call["source"], call["dest"], **call["options"])
    return [began, time.time()]


def access(socket: str, times: int) -> list[float]:
    """Call GetAccess many times."""
    one = client(socket)
    return [timed(one.access) for _ in range(times)]


def first(socket: str) -> float:
    """Make the first call of a new connection."""
    with Client(socket, wait_for_ready=60) as one:
        return timed(one.access)


def concurrently(socket: str, loads: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Conversions in a thread for each load, each with a connection of its own."""
    seconds: list[float] = []

    def work(number: int, calls: list[dict[str, Any]]) -> None:
        seconds.extend(convert(socket, call, number)["seconds"] for call in calls)

    for number in range(len(loads)):
        client(socket, number).access()
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(loads)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": seconds, "span": [began, time.monotonic()]}


def occupy(socket: str, calls: list[dict[str, Any]]) -> int:
    """Repeat the same conversions in threads, until standard input ends."""

    def work(call: dict[str, Any]) -> None:
        while not stopping.is_set():
            try:
                convert(socket, call)
            except errors.ConvertError:
                if not stopping.is_set():
                    raise

    client(socket).access()
    for call in calls:
        threading.Thread(target=work, args=(call,), daemon=True).start()
    return len(calls)


def running(socket: str) -> int:
    """How many conversions of this user are running."""
    return sum(job.state == "running" for job in client(socket).jobs())


COMMANDS: dict[str, Callable[..., Any]] = {
    "convert": convert,
    "timeline": timeline,
    "access": access,
    "first": first,
    "concurrently": concurrently,
    "occupy": occupy,
    "running": running,
}


def execute(socket: str, name: str, arguments: list[Any]) -> list[Any]:
    """Execute one command."""
    try:
        return [COMMANDS[name](socket, *arguments), None]
    except errors.ConvertError as error:
        return [None, f"{type(error).__name__}: {error}"]


def main(socket: str) -> None:
    """Execute commands until standard input ends."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(execute(socket, name, arguments)) + "\n")
        sys.stdout.flush()
    stopping.set()
    for one in clients:
        one.close()


if __name__ == "__main__":
    main(sys.argv[1])
