"""The values that a policy file may hold, each read from its text by `of`.

Pure. `of` takes whatever stands in the file, and raises ValueError with a reason that can be shown.
"""

from __future__ import annotations

import re
from typing import Final, Self

from convertd_core import validation, values

MAX_ID: Final = 2**32 - 2
"""The highest uid and gid: 2**32 - 1 means "none" to the kernel. Source: chown(2)."""

SIZE_UNITS: Final = {"B": 1} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", start=1)
}
TIME_UNITS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_QUANTITY: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)")


class Count(int):
    """A whole number."""

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it. An integer is the only form; true and false are none."""
        if type(value) is not int:
            raise ValueError("must be a whole number")
        return cls(value)


class Size(int):
    """Bytes, written with a binary unit: "2 TiB"."""

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it."""
        return cls(_quantity(value, SIZE_UNITS, "a size"))


class Duration(float):
    """Seconds, written with a unit: "10 min"."""

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it."""
        return cls(_quantity(value, TIME_UNITS, "a time"))


class Mode(int):
    """Permission bits, written in octal: "0640"."""

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it."""
        if not re.fullmatch("0[0-7]{3}", text := _text(value)):
            raise ValueError('must be four octal digits in quotes, like "0640"')
        mode = cls(text, 8)
        if mode & ~validation.MODE_BITS:
            raise ValueError(f"{text!r} has bits outside of 0666")
        return mode


class AbsolutePath(str):
    """A path from `/` that means the same however it is read."""

    __slots__ = ()

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it."""
        path = _text(value)
        if not path.isprintable() or len(path.encode()) > validation.MAX_PATH_BYTES:
            raise ValueError("must be a path of printable characters, of at most 4095 bytes")
        names = path.removeprefix("/").split("/")
        if not path.startswith("/") or (path != "/" and {"", ".", ".."} & set(names)):
            reason = "must be absolute, without '.', '..', '//' or a '/' at the end"
            raise ValueError(f"{path!r} {reason}")
        return cls(path)


class Format(str):
    """An image format that convertd knows."""

    __slots__ = ()
    known = values.FORMATS
    verb = "reads"

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it."""
        if (name := _text(value)) not in cls.known:
            raise ValueError(f"{name!r} is not a format that convertd {cls.verb}")
        return cls(name)


class WritableFormat(Format):
    """An image format that convertd can write."""

    __slots__ = ()
    known = values.WRITABLE_FORMATS
    verb = "writes"


class Account(str):
    """A user or a group: a name, or a number."""

    __slots__ = ()

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it: a string, or an integer for an id."""
        text = str(value) if type(value) is int else _text(value)
        if not re.fullmatch(r"[^\x00-\x20\x7f:/,-][^\x00-\x1f\x7f:/,]{0,255}", text):
            raise ValueError(f"{text!r} is neither a name nor the number of one")
        account = cls(text)
        check_id(account.number or 0)
        return account

    @property
    def number(self) -> int | None:
        """The id, if it is written as a number."""
        return int(self) if re.fullmatch("[0-9]+", self) else None


class Writer(str):
    """A user (a name, or a number), or "group:" and a group."""

    __slots__ = ()
    GROUP = "group:"

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it: a string, or an integer for a uid."""
        if isinstance(value, str) and value.startswith(cls.GROUP):
            return cls(cls.GROUP + Account.of(value.removeprefix(cls.GROUP)))
        return cls(Account.of(value))

    @property
    def is_group(self) -> bool:
        """Whether it is a group."""
        return self.startswith(self.GROUP)

    @property
    def account(self) -> Account:
        """The user or group."""
        return Account(self.removeprefix(self.GROUP))


class Ownership(str):
    """Whose the files are that are created: "caller", or "user:group"."""

    __slots__ = ()

    @classmethod
    def of(cls, value: object) -> Self:
        """Read it."""
        text = _text(value)
        if text != "caller" and text.count(":") != 1:
            raise ValueError(f'{text!r} is neither "caller" nor of the form "user:group"')
        for account in text.split(":"):
            Account.of(account)
        return cls(text)

    @property
    def accounts(self) -> tuple[Account, Account] | None:
        """The user and the group; None for the caller."""
        user, colon, group = self.partition(":")
        return (Account(user), Account(group)) if colon else None


def check_id(number: int) -> int:
    """Return an id that a user or group can have.

    Raises:
        ValueError: it is out of range, or what the kernel says for anybody it can't name.
    """
    if number == values.OVERFLOW_ID:
        raise ValueError(
            f"the id {values.OVERFLOW_ID} is not allowed: it stands for every id that a user"
            " namespace does not map"
        )
    if number > MAX_ID:
        raise ValueError(f"the id {number} is higher than {MAX_ID}")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string in quotes")  # noqa: TRY004 - one reason, one type
    return value


def _quantity(value: object, units: dict[str, int], what: str) -> float:
    match = _QUANTITY.fullmatch(_text(value))
    if not match or match[2] not in units:
        raise ValueError(f"{value!r} is not {what}: a number and one of {', '.join(units)}")
    number, unit = match.groups()
    return float(number) * units[unit] if "." in number else int(number) * units[unit]
