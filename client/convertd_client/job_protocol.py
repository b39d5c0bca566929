"""What is said to the job program, and what it answers.

The program comes with this package, in the same version, so neither side bears with the other's
mistakes. Imports no gRPC.
"""

from __future__ import annotations

from convertd_client import errors
from convertd_client.conversion import Conversion
from convertd_core import codec, conditions, messages, values


def convert(asked: Conversion, qemu_img: str) -> bytes:
    """The order to convert an image. Its passphrases go another way."""
    order = messages.LocalRequest(qemu_img=qemu_img, request=asked.request)
    return codec.encode(order)


def inspect(path: str, image_format: str, qemu_img: str) -> bytes:
    """The order to look at an image."""
    request = values.InspectRequest(source=values.Source(path=path, format=image_format))
    order = messages.LocalRequest(qemu_img=qemu_img, request=request)
    return codec.encode(order)


def unsupported(what: str, why: str) -> errors.Unimplemented:
    """The error for a thing that can't be had here, as the daemon would word it."""
    message = f"{what} is not supported: {why}"
    metadata = {"what": what, "why": why}
    return errors.Unimplemented(message, reason="UNSUPPORTED", metadata=metadata)


def event(data: bytes) -> object:
    """A message of the job."""
    return codec.decode(data, *messages.FROM_JOB)


def failure(told: conditions.Failure) -> errors.ConvertError:
    """Why the job was not done."""
    return errors.of_reason(told.reason, told.message, dict(told.values))
