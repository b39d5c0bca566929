"""A slot for the one child that a job forks ahead of the program that the child will become.

fork(2), and the first steps of a process whose pages are all still shared, take some 5 ms
(2 cores, 2026-11). Done while a job waits for something else, they delay nothing.
"""

import os
from collections.abc import Iterable

from convertd_daemon.sandbox import landlock, preforked
from convertd_daemon.sandbox.preforked import PreforkedChild


class PreforkSlot:
    """A job's slot. Owns the child in it.

    A Landlock layer binds the calling process alone: a job that binds itself to its images could
    not signal a child that it forked before. So the layer about signals comes first, before
    anything is forked, and later layers are passed on to the child.
    """

    def __init__(self, compiled: bytes) -> None:
        """Let the calling process signal only what it forks from now on; can't be undone.

        `compiled` is seccomp.compile_profile(seccomp.QEMU_IMG).

        Raises:
            OSError, ValueError: as landlock.enforce().
        """
        self._compiled = compiled
        self._child: PreforkedChild | None = None
        self._bound = landlock.keep_signals()

    def fork(self) -> None:
        """Fork a child, if there is none.

        Raises:
            OSError: no process, or no descriptor, is to be had.
        """
        if self._child is None:
            self._child = preforked.fork(self._compiled)

    def take(self) -> PreforkedChild | None:
        """Give the child away; None if there is none, or it has died."""
        child, self._child = self._child, None
        if child is not None and not child.is_alive():
            child.close()
            return None
        return child

    def add_landlock_layer(self, rules: Iterable[landlock.Rule]) -> None:
        """Bind the calling process and the child to `rules`; can't be undone.

        Raises:
            LandlockMissing: the kernel has none.
            OSError: a rule can't be made, or the ruleset not enforced.
            ValueError: as landlock.enforce().
        """
        made = landlock.ruleset(rules, but=self._bound)
        try:
            landlock.enforce(made)
            if self._child is not None:
                self._child.add_landlock_layer(made)
        finally:
            os.close(made)

    def close(self) -> None:
        """Kill and reap the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
