"""Convert disk images through convertd, the daemon that has the rights for it.

    from convertd_client import Client

    with Client() as client:
        result = client.convert("/srv/images/a.vmdk", "/srv/images/a.qcow2", dest_format="qcow2")

`AsyncClient` is the same for asyncio, `local.convert` the same without a daemon and with no more
than one's own rights, and `nova` has the names that OpenStack Nova uses. Every error is a
`ConvertError`; see `errors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from convertd_client import errors, results
from convertd_client.errors import ConvertError
from convertd_client.results import ConvertResult, ImageInfo, Progress

if TYPE_CHECKING:
    from convertd_client.aio import AsyncClient
    from convertd_client.client import Client

__all__ = [
    "AsyncClient",
    "Client",
    "ConvertError",
    "ConvertResult",
    "ImageInfo",
    "Progress",
    "errors",
    "results",
]

_LATER: Final = {"AsyncClient": "convertd_client.aio", "Client": "convertd_client.client"}
"""What needs gRPC, which takes longer to import than all the rest, and is not needed locally."""


def __getattr__(name: str) -> object:
    """Import a client when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
