"""Which system calls a qemu-img may make at all, by what they are for.

Held against strace(1) of qemu-img 7.2 and 10.0 in every command, format, cache mode and kind of
file that a job asks for, and against what C libraries take in place of a call that they lack. To
be on this list a call must reach nothing but the process itself, its descriptors, and what Landlock
governs, or be refused in part by seccomp.QEMU_IMG. Names that an architecture lacks are left out.
"""

from typing import Final

_OPENING: Final = "open openat openat2 creat close close_range"

# Landlock does not govern these: they tell that a name exists, with its size, owner and times.
# A filter can't read the name, and without fstat(2), which is one of them, no program runs.
_LOOKING: Final = "stat lstat fstat newfstatat statx access faccessat faccessat2 fstatfs"

_FILES: Final = (
    "read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek "
    "copy_file_range ftruncate fallocate fadvise64 readahead fsync fdatasync "
    "getdents getdents64 flock ioctl fcntl dup dup2 dup3 pipe pipe2"
)

_MEMORY: Final = (
    "mmap munmap mprotect mremap madvise brk mincore msync mlock mlock2 munlock membarrier "
    "pkey_alloc pkey_free pkey_mprotect mseal map_shadow_stack "
    "get_mempolicy set_mempolicy set_mempolicy_home_node mbind"
)

_THREADS: Final = (
    "clone exit exit_group futex futex_waitv futex_wake futex_wait futex_requeue set_robust_list "
    "rseq set_tid_address arch_prctl prctl gettid getpid getppid getcpu sched_yield "
    "sched_getaffinity sched_getparam sched_getscheduler sched_getattr sched_rr_get_interval "
    "sched_get_priority_max sched_get_priority_min restart_syscall"
)

_SIGNALS: Final = (
    "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait "
    "sigaltstack signalfd signalfd4 pause"
)

_TIME: Final = (
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times alarm "
    "getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete "
    "timerfd_create timerfd_settime timerfd_gettime"
)

_WAITING: Final = (
    "poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait "
    "epoll_pwait2 eventfd eventfd2"
)

_ABOUT_ITSELF: Final = (
    "getuid geteuid getgid getegid getresuid getresgid getgroups capget getpgid getpgrp getsid "
    "getrlimit setrlimit prlimit64 getrusage getpriority ioprio_get umask getcwd uname sysinfo "
    "getrandom"
)

QEMU_IMG: Final = (
    f"{_OPENING} {_LOOKING} {_FILES} {_MEMORY} {_THREADS} {_SIGNALS} {_TIME} {_WAITING} "
    f"{_ABOUT_ITSELF}"
)
