"""Every condition that a caller can meet: one class each, which states its gRPC status.

A condition's values are its attributes, its message is one sentence with those values in it, and
its `reason` is its class's name in UPPER_SNAKE: what `google.rpc.ErrorInfo` carries, and what
outsiders may rely on. `Failure` is a condition on its way through a channel.

A new condition is a class in one of these modules and a line in docs/api.md: the client takes its
own class from the condition's status, or from its kind: convertd_client/errors.py names those that
callers act on. A class without a sentence is such a kind.
"""

from __future__ import annotations

from convertd_core.conditions.base import *  # noqa: F403
from convertd_core.conditions.execution import *  # noqa: F403
from convertd_core.conditions.request import *  # noqa: F403
from convertd_core.conditions.state import *  # noqa: F403
