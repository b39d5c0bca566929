"""Filters: what a profile refuses is refused, whatever the register, number or architecture."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import mmap
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from children import in_child

from convertd_daemon.linux import libseccomp, prctl
from convertd_daemon.linux import seccomp as kernel_seccomp
from convertd_daemon.sandbox import errors, seccomp

X86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason=f"needs x86_64, this is {platform.machine()}"
)
X32_BIT = 0x40000000
GETPID_X86_64 = 39
GETPID_I386 = 20

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int) -> str:
    """Make a system call with whole registers; give the errno's name, or "done"."""
    wide = [ctypes.c_ulong(argument) for argument in arguments]
    if libc.syscall(ctypes.c_long(number), *wide) == -1:
        return errno.errorcode[ctypes.get_errno()]
    return "done"


def profile(*refusals: seccomp.Refusal) -> bytes:
    """Compile a profile of a test's own."""
    return seccomp.compile_profile(seccomp.Profile(name="test", refusals=refusals))


def load(program: bytes) -> None:
    """Load a filter as a child does."""
    prctl.set_no_new_privs()
    seccomp.load(program)


def test_both_seccomp_profiles_fit_into_the_kernel_limit() -> None:
    """Short enough for the kernel, which takes 4,096 instructions."""
    for which in (seccomp.QEMU_IMG, seccomp.FRONT):
        program = seccomp.compile_profile(which)
        assert len(program) % kernel_seccomp.INSTRUCTION_BYTES == 0
        assert 100 < len(program) // kernel_seccomp.INSTRUCTION_BYTES < 4096


def test_each_refused_system_call_has_a_reason() -> None:
    """A list without reasons can't be judged."""
    for which in (seccomp.QEMU_IMG, seccomp.FRONT):
        for refusal in which.refusals:
            assert len(refusal.why) > 10, refusal
            assert refusal.calls.split(), refusal


@pytest.mark.parametrize("which", [seccomp.QEMU_IMG, seccomp.FRONT], ids=lambda one: one.name)
def test_each_unconditionally_refused_system_call_returns_its_errno(which: seccomp.Profile) -> None:
    """All of the list, one by one, with the answer that it states."""
    library = ctypes.CDLL("libseccomp.so.2")
    expected: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for refusal in which.refusals:
        for name in refusal.calls.split():
            number = library.seccomp_syscall_resolve_name(name.encode())
            if not refusal.when and number >= 0:
                numbers[name] = number
                expected[name] = errno.errorcode[refusal.answer]

    def act() -> dict[str, str]:
        os.setresuid(1234, 1234, 1234)  # should a refusal be missing, no harm is done
        load(seccomp.compile_profile(which))
        return {name: call(number, 0, 0, 0, 0, 0, 0) for name, number in numbers.items()}

    assert len(numbers) > 80
    assert in_child(act) == expected


def test_high_bits_of_an_argument_do_not_bypass_the_filter() -> None:
    """The kernel reads 32 of the 64 (CVE-2019-7303)."""
    tiocsti, high = 0x5412, 1 << 40

    def act() -> list[str]:
        load(seccomp.compile_profile(seccomp.QEMU_IMG))
        with open("/dev/null", "r+b") as null:
            ioctl = 16 if platform.machine() == "x86_64" else 29
            return [
                call(ioctl, null.fileno(), tiocsti, 0),
                call(ioctl, null.fileno(), tiocsti | high, 0),
                call(ioctl, null.fileno(), 0x5401, 0),  # TCGETS, which is not refused
            ]

    assert in_child(act) == ["EPERM", "EPERM", "ENOTTY"]


def test_system_call_newer_than_the_list_returns_enosys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown with a list that ends right before close_range(2)."""
    close_range = 436
    assert call(close_range, 9, 8, 0) == "EINVAL"
    monkeypatch.setattr(seccomp, "NEWEST_CALL", close_range - 1)
    program = seccomp.compile_profile(seccomp.Profile(name="old", refusals=()))

    def act() -> list[str]:
        load(program)
        return [call(close_range, 9, 8, 0), call(close_range - 2, 0, 0)]

    assert in_child(act) == ["ENOSYS", "EINVAL"]  # pidfd_open(0) is below


def test_system_call_that_is_not_allowed_returns_enosys() -> None:
    """However it lies among those that are; one that is refused in part goes on to be judged."""
    first_is_1 = libseccomp.Condition(argument=0, compare=libseccomp.Compare.EQ, value=1)
    refusal = seccomp.Refusal(calls="prctl", why="in part", when=(first_is_1,))
    few = "read write exit exit_group mmap munmap brk futex rt_sigreturn close getpid"
    program = seccomp.compile_profile(
        seccomp.Profile(name="few", refusals=(refusal,), allowed=f"{few} s390_pci_mmio_read")
    )
    library = ctypes.CDLL("libseccomp.so.2")
    names = ("getpid", "getppid", "gettid", "prctl", "pidfd_open")
    numbers = [library.seccomp_syscall_resolve_name(name.encode()) for name in names]

    def act() -> list[str]:
        load(program)
        high = 0x3FFFFFFF  # the last before the x32 bit
        return [*(call(number, 1, 0, 0, 0, 0) for number in numbers), call(high)]

    # os.write() and os._exit() of in_child() are among the few.
    assert in_child(act) == ["done", "ENOSYS", "ENOSYS", "EPERM", "ENOSYS", "ENOSYS"]


def test_no_system_call_is_both_allowed_and_refused() -> None:
    """One of the two lists would be wrong."""
    allowed = (seccomp.QEMU_IMG.allowed or "").split()
    assert len(allowed) == len(set(allowed))
    outright = {
        call
        for refusal in seccomp.QEMU_IMG.refusals
        if not refusal.when
        for call in refusal.calls.split()
    }
    assert not outright & set(allowed)


def signal_of(act: Callable[[], object]) -> int:
    """Give the signal that ends a child with qemu-img's filter when it acts."""

    def filtered() -> None:
        load(seccomp.compile_profile(seccomp.QEMU_IMG))
        act()

    with pytest.raises(ChildProcessError) as killed:
        in_child(filtered)
    return killed.value.errno or 0


@X86_64
def test_x32_system_call_kills_the_process() -> None:
    """Its numbers are others, so no refusal would apply."""
    assert signal_of(lambda: call(X32_BIT | GETPID_X86_64)) == signal.SIGSYS


@X86_64
def test_i386_system_call_kills_the_process() -> None:
    """Any 64-bit process can make one, by int 0x80."""
    code = b"\xb8" + struct.pack("I", GETPID_I386) + b"\xcd\x80\xc3"  # mov eax; int 0x80; ret
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    getpid = ctypes.CFUNCTYPE(ctypes.c_int)(address)
    assert in_child(lambda: getpid() > 0)  # without a filter, it works
    assert signal_of(getpid) == signal.SIGSYS


def test_seccomp_profile_allows_threads_and_refuses_processes() -> None:
    """Libc falls back from clone3(2) to clone(2)."""

    def act() -> tuple[int, str]:
        load(seccomp.compile_profile(seccomp.QEMU_IMG))
        threads = [threading.Thread(target=lambda: None) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            os.fork()
        except OSError as error:
            return len(threads), errno.errorcode[error.errno or 0]
        return len(threads), "done"

    assert in_child(act) == (8, "EPERM")


def test_front_profile_allows_local_sockets_only() -> None:
    """Others answer as if the kernel lacked them."""

    def act() -> list[str]:
        load(seccomp.compile_profile(seccomp.FRONT))
        socket.socket(socket.AF_UNIX).close()
        results = []
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_VSOCK):
            try:
                socket.socket(family, socket.SOCK_DGRAM)
            except OSError as error:
                results.append(errno.errorcode[error.errno or 0])
        try:
            subprocess.run(["/bin/true"], check=True)
        except OSError as error:
            results.append(errno.errorcode[error.errno or 0])
        return results

    assert in_child(act) == [*["EAFNOSUPPORT"] * 4, "EPERM"]


def test_seccomp_filter_requires_no_new_privs() -> None:
    """Or CAP_SYS_ADMIN, which the sandbox does not have."""

    def act() -> int | None:
        os.setresuid(1234, 1234, 1234)
        try:
            seccomp.load(seccomp.compile_profile(seccomp.QEMU_IMG))
        except OSError as error:
            return error.errno
        return None

    assert in_child(act) == errno.EACCES


@pytest.mark.parametrize("program", [b"", b"1234567"], ids=["nothing", "half an instruction"])
def test_invalid_bpf_program_is_not_loaded(program: bytes) -> None:
    """A mistake of ours, found before the kernel sees it."""
    with pytest.raises(ValueError, match="not a BPF program"):
        kernel_seccomp.set_mode_filter(program)


def test_bpf_program_that_the_kernel_refuses_is_an_error() -> None:
    """Garbage of the right length."""

    def act() -> int | None:
        prctl.set_no_new_privs()
        try:
            kernel_seccomp.set_mode_filter(b"\xff" * 16)
        except OSError as error:
            return error.errno
        return None

    assert in_child(act) == errno.EINVAL


def test_unknown_system_call_name_in_a_profile_is_an_error() -> None:
    """A typing error in a list must not leave a hole."""
    wrong = seccomp.Profile(
        name="wrong", refusals=(seccomp.Refusal(calls="sokcet", why="a typing error"),)
    )
    with pytest.raises(errors.FilterMissing, match="sokcet"):
        seccomp.compile_profile(wrong)


def test_system_call_of_another_architecture_is_left_out() -> None:
    """It can't be made here; libseccomp knows its name."""
    program = profile(seccomp.Refusal(calls="s390_pci_mmio_read getpgid", why="only one is here"))

    def act() -> str:
        load(program)
        return call(121 if platform.machine() == "x86_64" else 155, 0)

    assert in_child(act) == "EPERM"


def test_system_call_unknown_to_an_old_libseccomp_is_refused_by_number() -> None:
    """fchmodat2(2) came after Debian 12's library; we know its number."""
    program = profile(seccomp.Refusal(calls="fchmodat2", why="by its number"))

    def act() -> str:
        load(program)
        return call(452, 0, 0, 0, 0)

    assert in_child(act) == "EPERM"


WITHOUT_LIBSECCOMP = """
import ctypes
from convertd_daemon.sandbox import errors, seccomp
def missing(name, **_):
    raise OSError(f"{name}: cannot open shared object file")
ctypes.CDLL = missing
try:
    seccomp.compile_profile(seccomp.QEMU_IMG)
except errors.FilterMissing as error:
    print(error)
"""


def test_missing_libseccomp_is_reported() -> None:
    """And the error says so."""
    argv = [sys.executable, "-I", "-c", WITHOUT_LIBSECCOMP]
    printed = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert "libseccomp.so.2: cannot open shared object file" in printed


def test_rule_that_libseccomp_refuses_is_an_error() -> None:
    """There is no seventh argument."""
    seventh = libseccomp.Condition(argument=6, compare=libseccomp.Compare.EQ, value=0)
    with pytest.raises(errors.FilterMissing, match="libseccomp: getpid: Invalid argument"):
        profile(seccomp.Refusal(calls="getpid", why="a bad condition", when=(seventh,)))


def test_seccomp_profile_is_compiled_once() -> None:
    """The broker keeps the bytes for all its jobs."""
    again = dataclasses.replace(seccomp.QEMU_IMG)
    assert seccomp.compile_profile(again) is seccomp.compile_profile(seccomp.QEMU_IMG)
