"""The path of the daemon's socket, and why the daemon can't be reached."""

from __future__ import annotations

import os
import socket
import stat
from typing import Final

from convertd_client import errors

DEFAULT_PATH: Final = "/run/convertd/convertd.sock"
VARIABLE: Final = "CONVERTD_SOCKET"
"""The environment variable that overrides the default path."""

MAX_PATH_BYTES: Final = 107
"""The size of sockaddr_un's path, without its NUL. Source: unix(7)."""

DEFAULT_TIMEOUT_S: Final = 60.0
"""For calls that a daemon answers at once."""

DEFAULT_WAIT_S: Final = 5.0
"""How long a call waits for a daemon that does not listen: enough for a restart."""

_CONNECT_TIMEOUT_S: Final = 1.0


def path_of(chosen: str | os.PathLike[str] | None) -> str:
    """The absolute path of the socket to connect to.

    Raises:
        ValueError: the path is too long for a socket.
    """
    path = os.path.abspath(os.fspath(chosen or os.environ.get(VARIABLE) or DEFAULT_PATH))
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ValueError(f"the path of a socket has at most {MAX_PATH_BYTES} bytes: {path!r}")
    return path


def refusal(path: str) -> errors.Unreachable | None:
    """Why a call can't succeed by waiting for this socket; None where waiting may help."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        return _not_permitted(path)
    except OSError:
        return None
    if not stat.S_ISSOCK(mode):
        return _unreachable("NOT_A_SOCKET", f"{path} is not a socket", path)
    # connect(2) to a socket needs the right to write to it. Source: unix(7).
    if not os.access(path, os.W_OK, effective_ids=True):
        return _not_permitted(path)
    return None


def diagnosis(path: str) -> errors.Unreachable:
    """Why the daemon did not answer; connects once more, without gRPC."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(path)
        except FileNotFoundError:
            text = f"there is no {path}: the daemon is not installed, or not started"
            return _unreachable("SOCKET_MISSING", text, path)
        except PermissionError:
            return _not_permitted(path)
        except ConnectionRefusedError:
            text = f"no process listens on {path}: the daemon has stopped"
            return _unreachable("CONNECTION_REFUSED", text, path)
        except OSError as error:
            text = f"the daemon at {path} does not answer: {error.strerror or error}"
            return _unreachable("NOT_ANSWERING", text, path)
    text = f"the daemon at {path} takes connections, but does not answer"
    return _unreachable("NOT_ANSWERING", text, path)


def _not_permitted(path: str) -> errors.Unreachable:
    text = f"uid {os.geteuid()} is not permitted to connect to {path}"
    return _unreachable("SOCKET_NOT_PERMITTED", text, path, uid=str(os.geteuid()))


def _unreachable(reason: str, text: str, path: str, **values: str) -> errors.Unreachable:
    return errors.Unreachable(text, reason=reason, metadata={"socket": path, **values})
