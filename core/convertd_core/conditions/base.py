"""What every condition is, and how it passes from process to process."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import ClassVar, dataclass_transform


class Status(enum.StrEnum):
    """The names of gRPC's status codes, for the process that may not import gRPC."""

    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DATA_LOSS = "DATA_LOSS"
    ABORTED = "ABORTED"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A condition between processes: its reason, its sentence, its values as text."""

    reason: str
    message: str
    values: tuple[tuple[str, str], ...] = ()

    def with_undefined(self, device: str) -> Failure:
        """The same, of a conversion that had begun to write to a device."""
        return Failure(
            reason=self.reason,
            message=f"{self.message}; the content of {device} is undefined now",
            values=(*self.values, ("device", device), ("device_content", "undefined")),
        )

    @property
    def status(self) -> Status:
        """The gRPC status of the reason; INTERNAL for one that no condition has."""
        kind = BY_REASON.get(self.reason)
        return kind.status if kind else Status.INTERNAL


BY_REASON: dict[str, type[ConvertError]] = {}
"""Every condition by its reason. Filled as the classes below are made."""


@dataclass_transform(kw_only_default=True, eq_default=False)
class ConvertError(Exception):
    """A conversion that was not done, for a reason that its caller can act on.

    A subclass with a `sentence` is a condition: it becomes a dataclass of its annotations.
    """

    status: ClassVar[Status]
    reason: ClassVar[str]
    sentence: ClassVar[str]
    undefined_device = ""
    """The device on which the conversion had begun to write, if it had."""

    def __init_subclass__(cls, *, status: Status | None = None) -> None:
        super().__init_subclass__()
        if status is not None:
            cls.status = status
        if "sentence" in vars(cls):
            cls.reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()
            dataclass(kw_only=True, eq=False)(cls)
            BY_REASON[cls.reason] = cls

    def __str__(self) -> str:
        return self.sentence.format(**self.values())

    def values(self) -> dict[str, object]:
        """The condition's values by name, as they stand in the sentence."""
        return {name: getattr(self, name) for name in getattr(self, "__dataclass_fields__", ())}

    def failure(self) -> Failure:
        """The condition as it passes between processes, whatever text its values hold."""
        values = tuple((name, _sendable(str(value))) for name, value in self.values().items())
        failure = Failure(reason=self.reason, message=_sendable(str(self)), values=values)
        if self.undefined_device:
            return failure.with_undefined(self.undefined_device)
        return failure


def _sendable(text: str) -> str:
    """The text in valid Unicode: a lone surrogate can't be encoded, and who sent it is answered."""
    return text.encode("utf-8", "backslashreplace").decode()
