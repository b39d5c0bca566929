"""Which system calls a process of ours may not make, and why. Fails closed.

Landlock and the uid hold what has a path, and these filters hold what Landlock does not govern.
What is refused is listed with its reason. So that nothing is forgotten, qemu-img may make no call
that is not on its other list, of what it needs (allowed_calls.py); and to the front, which runs
Python and gRPC, a call younger than the list does not exist. Both answer ENOSYS, as a kernel
without that call, which C libraries are ready for.
"""

import errno
import functools
import struct
from dataclasses import dataclass
from typing import Final

from convertd_daemon.linux import libseccomp, seccomp
from convertd_daemon.linux.libseccomp import Compare, Condition
from convertd_daemon.sandbox import allowed_calls, errors, limits

# The youngest call the front's list has been held against: file_setattr(2), Linux 6.17.
NEWEST_CALL: Final = 469

_INT: Final = 0xFFFFFFFF
_CLONE_THREAD: Final = 0x00010000
_AT_EMPTY_PATH: Final = 0x1000
_AF_UNIX: Final = 1
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Calls (their names, blanks between), answered with an errno when all conditions hold."""

    calls: str
    why: str
    answer: int = errno.EPERM
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind of process, all that is refused to it, and all that it may ask for.

    `allowed` are calls (their names, blanks between) in addition to those in `refusals`, which are
    allowed where their conditions do not hold; every other call answers ENOSYS. None: each that is
    not refused is allowed, up to NEWEST_CALL.
    """

    name: str
    refusals: tuple[Refusal, ...]
    allowed: str | None = None


def _is(argument: int, value: int, *, mask: int = _INT) -> Condition:
    """Hold for an int argument; the kernel reads the low 32 bits of the register."""
    return Condition(argument=argument, compare=Compare.MASKED_EQ, value=value, mask=mask)


def _is_not(argument: int, value: int) -> Condition:
    """Hold for anything else, high bits that the kernel would ignore included."""
    return Condition(argument=argument, compare=Compare.NE, value=value)


def _lacks(argument: int, flag: int) -> Condition:
    """Hold when a flag is not set."""
    return Condition(argument=argument, compare=Compare.MASKED_EQ, value=0, mask=flag)


_NO_PROGRAM: Final = (
    Refusal(calls="execve", why="starts no other program"),
    Refusal(calls="fork vfork", why="stays one process, which one kill ends"),
    Refusal(
        calls="clone",
        why="threads only, for the same reason",
        when=(_lacks(0, _CLONE_THREAD),),
    ),
    Refusal(
        calls="clone3",
        why="its flags are in memory, where no filter reads; libc goes on with clone(2)",
        answer=errno.ENOSYS,
    ),
)

_NO_ONE_ELSE: Final = (
    Refusal(
        calls="kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo",
        why="another job has the same uid; abort(3) ends by itself after EPERM",
    ),
    Refusal(
        calls="pidfd_open pidfd_send_signal pidfd_getfd",
        why="signals to others, and their descriptors",
    ),
    Refusal(
        calls="ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp",
        why="another's memory",
    ),
    Refusal(
        calls="prlimit64",
        why="RLIMIT_CPU=0 on another process of the same uid kills it, on every Landlock",
        when=(_is_not(0, 0),),
    ),
    Refusal(
        calls=(
            "setpriority ioprio_set sched_setaffinity sched_setattr sched_setparam "
            "sched_setscheduler migrate_pages move_pages"
        ),
        why="slows others, or undoes our niceness",
    ),
    Refusal(
        calls="prctl",
        why="a changed PR_SET_PDEATHSIG would let it outlive the process that must end it",
        when=(_is(0, _PR_SET_PDEATHSIG),),
    ),
    Refusal(
        calls=(
            "shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv "
            "msgctl mq_open mq_unlink"
        ),
        why="a way to other processes that has no path for Landlock to govern",
    ),
)

_NO_IDENTITY: Final = (
    Refusal(
        calls=(
            "setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset"
        ),
        why="who it is has been settled, and a change disarms PR_SET_PDEATHSIG",
    ),
    Refusal(
        calls="add_key request_key keyctl",
        why="keys go by uid, which two jobs share",
    ),
)

_NO_FILE_BY_NAME: Final = (
    Refusal(
        calls="open_by_handle_at name_to_handle_at",
        why="with CAP_DAC_READ_SEARCH it opens any inode of a file system, by number",
    ),
    Refusal(
        calls=(
            "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes "
            "futimesat utimensat setxattr lsetxattr fsetxattr setxattrat removexattr "
            "lremovexattr fremovexattr removexattrat file_setattr"
        ),
        why="Landlock does not govern metadata",
    ),
    Refusal(
        calls=(
            "getxattr lgetxattr fgetxattr getxattrat listxattr llistxattr flistxattr listxattrat "
            "file_getattr"
        ),
        why="the same: with CAP_DAC_READ_SEARCH, what is in anybody's extended attributes",
    ),
    Refusal(
        calls="sync syncfs",
        why="has the kernel flush what others wrote, who then wait for it",
    ),
    Refusal(
        calls="truncate",
        why="Landlock governs it from ABI 3 only; ftruncate(2) is what qemu-img uses",
    ),
    Refusal(
        calls="inotify_init inotify_init1 inotify_add_watch fanotify_init fanotify_mark",
        why="Landlock does not govern watching",
    ),
    Refusal(
        calls="memfd_create memfd_secret",
        why="a file that Landlock never governs",
    ),
)

# ioctl(2)s by number, and whole families by the byte that says whose they are. What qemu-img asks
# of files and block devices is in others. Source: the headers named, ioctl-number.rst.
_IOCTLS: Final = {
    0x1: "SCSI_IOCTL_SEND_COMMAND: commands of one's own to a disk",
    0x5412: "TIOCSTI: types on another user's terminal",
    0x541C: "TIOCLINUX: the same on a console",
    0x5423: "TIOCSETD: loads line disciplines",
    0x8901: "FIOSETOWN: has signals sent to another process",
    0x8902: "SIOCSPGRP: the same",
    0x40086602: "FS_IOC_SETFLAGS: makes a file immutable, or append-only",
    0x40806685: "FS_IOC_ENABLE_VERITY: makes a file read-only for ever",
}
_IOCTL_FAMILIES: Final = {
    0x22: "scsi/sg.h: commands of one's own to a disk",
    0x4C: "linux/loop.h: moves a loop device over other parts of its file",
    0x4E: "linux/nvme_ioctl.h: commands of one's own to a disk",
    0x53: "linux/cdrom.h, scsi/scsi.h: ejects, locks, resets",
    0x94: "linux/btrfs.h: flushes a whole file system; and FICLONE, which is the job's to do",
    0x70: "linux/pr.h: reserves a shared disk, against the hosts that share it",
}

_NO_FAR_REACHING_IOCTL: Final = (
    *(Refusal(calls="ioctl", why=why, when=(_is(1, number),)) for number, why in _IOCTLS.items()),
    *(
        Refusal(calls="ioctl", why=why, when=(_is(1, family << 8, mask=0xFF00),))
        for family, why in _IOCTL_FAMILIES.items()
    ),
)

# fcntl(2) has a second way to signal and to hold up others. Source: F_SETOWN(2const) and its kin.
_FCNTLS: Final = {
    8: "F_SETOWN: has signals sent to another process",
    10: "F_SETSIG: chooses which one, SIGKILL too",
    15: "F_SETOWN_EX: the same",
    1024: "F_SETLEASE: other processes that open the file wait for up to 45 s",
    1026: "F_NOTIFY: Landlock does not govern watching",
}

_NO_FAR_REACHING_FCNTL: Final = tuple(
    Refusal(calls="fcntl", why=why, when=(_is(1, number),)) for number, why in _FCNTLS.items()
)

_NO_MACHINE: Final = (
    Refusal(
        calls=(
            "mount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount "
            "fspick mount_setattr statmount listmount pivot_root chroot"
        ),
        why="moves what paths mean",
    ),
    Refusal(
        calls="unshare setns",
        why="a user namespace of one's own opens most of the kernel to attack",
    ),
    Refusal(
        calls=(
            "bpf perf_event_open userfaultfd kexec_load kexec_file_load init_module "
            "finit_module delete_module lookup_dcookie modify_ldt iopl ioperm personality "
            "vhangup syslog"
        ),
        why="kernel surface that no conversion needs",
    ),
    Refusal(
        calls=(
            "swapon swapoff reboot acct quotactl quotactl_fd settimeofday clock_settime "
            "clock_adjtime adjtimex sethostname setdomainname"
        ),
        why="the machine's, not ours",
    ),
    Refusal(
        calls="io_uring_setup io_uring_enter io_uring_register",
        why="its operations pass by every filter; users fall back",
        answer=errno.ENOSYS,
    ),
)

_COMMON: Final = (
    *_NO_ONE_ELSE,
    *_NO_IDENTITY,
    *_NO_FILE_BY_NAME,
    *_NO_FAR_REACHING_IOCTL,
    *_NO_FAR_REACHING_FCNTL,
    *_NO_MACHINE,
    *_NO_PROGRAM,
)

QEMU_IMG: Final = Profile(
    name="qemu-img",
    allowed=allowed_calls.QEMU_IMG,
    refusals=(
        *_COMMON,
        Refusal(
            calls="readlink readlinkat",
            why="Landlock does not govern it: where anybody's links lead. qemu-img asks for "
            "/proc/self/exe, and goes on without",
        ),
        Refusal(
            calls="statfs ustat",
            why="nor how full any file system is; fstatfs(2) is what qemu-img uses",
        ),
        Refusal(
            calls=(
                "mkdir mkdirat rmdir link linkat symlink symlinkat rename renameat renameat2 "
                "unlink unlinkat mknod mknodat"
            ),
            why="Landlock governs it; and a job makes names, its qemu-img none",
        ),
        Refusal(
            calls=(
                "socket socketpair connect bind listen accept accept4 sendto sendmsg sendmmsg "
                "recvfrom recvmsg recvmmsg"
            ),
            why="no network, and Landlock does not govern connect(2) to a socket that has a path",
        ),
        # The way in: we execute the opened qemu-img itself at PROGRAM_DESCRIPTOR, which closes on
        # exec and can't be made again under RLIMIT_NOFILE. An absolute path is still heeded by the
        # kernel whatever the descriptor is; Landlock's EXECUTE on two inodes is what ends that.
        Refusal(
            calls="execveat",
            why="executes the program it is, once",
            when=(_is_not(0, limits.PROGRAM_DESCRIPTOR),),
        ),
        Refusal(
            calls="execveat",
            why="executes a descriptor, not a name",
            when=(_lacks(4, _AT_EMPTY_PATH),),
        ),
    ),
)

FRONT: Final = Profile(
    name="front",
    refusals=(
        *_COMMON,
        Refusal(calls="execveat", why="starts no other program"),
        Refusal(
            calls="socket socketpair",
            why="speaks to local sockets only",
            # What a kernel without that family answers, and what gRPC and libc are ready for.
            answer=errno.EAFNOSUPPORT,
            when=(_is_not(0, _AF_UNIX),),
        ),
    ),
)


@functools.cache
def compile_profile(profile: Profile) -> bytes:
    """Compile a profile to the bytes that load() takes. Slow (some ms): once, in the broker.

    Raises:
        FilterMissing: libseccomp is absent, or does not take the profile.
    """
    rules = [
        libseccomp.Rule(call=call, answer=refusal.answer, conditions=refusal.when)
        for refusal in profile.refusals
        for call in refusal.calls.split()
    ]
    try:
        return _refuse_unknown(profile) + libseccomp.compile_rules(rules)
    except (OSError, LookupError) as error:
        raise errors.FilterMissing(str(error)) from error


def load(program: bytes) -> None:
    """Bind the calling thread, for ever, to a compiled profile. Needs no_new_privs.

    Raises:
        OSError: the kernel does not take it; the thread is then not bound.
    """
    seccomp.set_mode_filter(program)


def _refuse_unknown(profile: Profile) -> bytes:
    """Give instructions to go first: ENOSYS for calls that are not in the profile.

    libseccomp has one default answer for all architectures and no rule on a number alone. What
    passes here goes on to its rules. So do numbers with the x32 bit, to be killed there; a number
    of another foreign architecture is refused here or killed there.
    """
    known = _ranges(_numbers(profile))
    load_word, jump, jump_if_equal_or_more, jump_if_more = 0x20, 0x05, 0x35, 0x25
    give, answer, x32_bit = 0x06, 0x00050000 | errno.ENOSYS, 0x40000000
    code = [(load_word, 0, 0, 0)]  # struct seccomp_data: nr is first
    for first, last in (*known, (x32_bit, _INT)):
        code += [
            (jump_if_equal_or_more, 0, 2, first),
            (jump_if_more, 1, 0, last),
            (jump, 0, 0, 0),  # to the end; how far that is, is not known yet
        ]
    code.append((give, 0, 0, answer))
    for index, instruction in enumerate(code):
        if instruction[0] == jump:
            code[index] = (jump, 0, 0, len(code) - index - 1)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _numbers(profile: Profile) -> set[int]:
    """The numbers of the calls that a profile knows.

    Raises:
        OSError: libseccomp is missing.
        LookupError: a call's name that neither the library nor we know.
    """
    if profile.allowed is None:
        return set(range(NEWEST_CALL + 1))
    calls = [
        *profile.allowed.split(),
        *(call for one in profile.refusals for call in one.calls.split()),
    ]
    numbers = (libseccomp.number(call) for call in calls)
    return {number for number in numbers if number is not None}


def _ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """Numbers as ranges, first and last, in order."""
    firsts = sorted(number for number in numbers if number - 1 not in numbers)
    lasts = sorted(number for number in numbers if number + 1 not in numbers)
    return list(zip(firsts, lasts, strict=True))
