"""libseccomp: compile a typed description of a filter into the bytes that seccomp(2) takes.

The library is loaded at first use, so that a process that loads a compiled filter needs none.
"""

import ctypes
import enum
import errno
import functools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from convertd_daemon.linux import syscall

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL_PROCESS: Final = 0x80000000
_ATTRIBUTE_BADARCH: Final = 2
_UNKNOWN_NAME: Final = -1  # __NR_SCMP_ERROR; other negative numbers: not on this architecture


class Compare(enum.IntEnum):
    """How an argument is compared, always as 64 bits. Source: seccomp.h, enum scmp_compare."""

    NE = 1
    EQ = 4
    MASKED_EQ = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One comparison of a system call's argument, the first of which is number 0.

    The kernel reads an int argument from the low 32 bits and ignores the rest: to *refuse* a
    value of an int, use MASKED_EQ with a 32-bit mask, or the high bits go around the rule
    (CVE-2019-7303, CVE-2019-10063).
    """

    argument: int
    compare: Compare
    value: int
    mask: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Answer a system call with an errno when all conditions hold (none: always)."""

    call: str
    answer: int
    conditions: tuple[Condition, ...] = ()


def compile_rules(rules: Sequence[Rule]) -> bytes:
    """Compile a filter that refuses what a rule names and allows everything else.

    A call of a foreign architecture (i386 and x32 on x86_64) kills the process. A rule for a
    call that this architecture does not have is left out.

    Raises:
        OSError: the library is missing, or refuses a rule.
        LookupError: neither the library nor SINCE_5_1 knows a call's name.
    """
    library = _library()
    context = library.seccomp_init(_ALLOW)
    if not context:
        raise OSError(errno.ENOMEM, "seccomp_init")
    context = ctypes.c_void_p(context)
    try:
        _check(library.seccomp_attr_set(context, _ATTRIBUTE_BADARCH, _KILL_PROCESS), "BADARCH")
        for rule in rules:
            _add(library, context, rule)
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _add(library: ctypes.CDLL, context: ctypes.c_void_p, rule: Rule) -> None:
    found = number(rule.call)
    if found is None:
        return
    comparisons = b"".join(_comparison(condition) for condition in rule.conditions)
    result = library.seccomp_rule_add_exact_array(
        context, _ERRNO | rule.answer, found, len(rule.conditions), comparisons
    )
    _check(result, rule.call)


def _comparison(condition: Condition) -> bytes:
    """Lay out a struct scmp_arg_cmp: argument, comparison, and one datum or two."""
    data = (condition.value, 0)
    if condition.compare is Compare.MASKED_EQ:
        data = (condition.mask, condition.value)
    return struct.pack("IiQQ", condition.argument, condition.compare, *data)


def number(name: str) -> int | None:
    """Return a system call's number on this architecture; None where it has no such call.

    Raises:
        OSError: the library is missing.
        LookupError: neither the library nor SINCE_5_1 knows the name.
    """
    found: int = _library().seccomp_syscall_resolve_name(name.encode())
    if found >= 0:
        return found
    if name in syscall.SINCE_5_1:
        return syscall.SINCE_5_1[name]
    if found == _UNKNOWN_NAME:
        raise LookupError(f"no system call is named {name}")
    return None


def _export(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    with os.fdopen(os.memfd_create("filter"), "r+b", buffering=0) as file:
        _check(library.seccomp_export_bpf(context, file.fileno()), "seccomp_export_bpf")
        file.seek(0)
        return file.read()


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp: {what}: {os.strerror(-result)}")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_exact_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_char_p,
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library
