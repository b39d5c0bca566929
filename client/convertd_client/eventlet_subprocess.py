"""The daemon's client in a subprocess, for callers in which gRPC's threads can't run.

eventlet, which Nova may use, turns threads into coroutines that yield only where Python waits. gRPC
waits in C: the first event of a conversion is never delivered, and the caller hangs (seen with
eventlet 0.41 and grpcio 1.85; a thread of eventlet.tpool doesn't help). To wait for a child yields.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Final

from convertd_client import errors, job

# -I ignores the environment and the working directory; the package is loaded by our own path.
_START: Final = """
import importlib.util, pickle, sys
spec = importlib.util.spec_from_file_location("convertd_client", sys.argv.pop())
package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
method, arguments, options = pickle.load(sys.stdin.buffer)
try:
    with package.Client() as client:
        end = getattr(client, method)(*arguments, **options)
except package.ConvertError as error:
    end = error
pickle.dump(end, sys.stdout.buffer)
"""


def is_needed() -> bool:
    """Whether eventlet has replaced this process's threads."""
    patcher = getattr(sys.modules.get("eventlet"), "patcher", None)
    return patcher is not None and bool(patcher.is_monkey_patched("thread"))


def call(method: str, *arguments: object, **options: object) -> object:
    """Call a method of `Client`, and return its result.

    If the wait is interrupted, the child is killed, which cancels its conversion.

    Raises:
        errors.ConvertError: as the method, or the child can't be started.
    """
    done = subprocess.run(
        [job.interpreter(), "-I", "-c", _START, f"{sys.modules['convertd_client'].__file__}"],
        input=pickle.dumps((method, arguments, options)),
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        text = f"the client's process ended without an answer, with status {done.returncode}"
        raise errors.OutcomeUnknown(text, reason="CLIENT_DIED")
    end = pickle.loads(done.stdout)  # noqa: S301 - by our own program
    if isinstance(end, errors.ConvertError):
        raise end
    return end
