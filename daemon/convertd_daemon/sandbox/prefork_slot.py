"""Where a job's programs go in: with one process, perhaps, that waits there ahead of its program.

fork(2), and the first steps of a process whose pages are all still shared, take some 5 ms
(2 cores, 2026-11); while a job waits for something, they cost nobody any time.
"""

import os
from collections.abc import Iterable

from convertd_daemon.sandbox import landlock, preforked
from convertd_daemon.sandbox.preforked import PreforkedChild


class PreforkSlot:
    """A job's own. Owns the process that waits.

    Layers of Landlock bind whom they find: a job that binds itself to its images could not end what
    it forked before. So the layer about signals comes first, before anything is forked, and the
    others are passed on to who waits.
    """

    def __init__(self, compiled: bytes) -> None:
        """Bind the calling process to signal nobody but what it forks from now on, for ever.

        `compiled` is seccomp.compile_profile(seccomp.QEMU_IMG).

        Raises:
            OSError, ValueError: as landlock.enforce().
        """
        self._compiled = compiled
        self._waiting: PreforkedChild | None = None
        self._bound = landlock.keep_signals()

    def fork(self) -> None:
        """Have a process wait, if none does.

        Raises:
            OSError: no process, or no descriptor, is to be had.
        """
        if self._waiting is None:
            self._waiting = preforked.fork(self._compiled)

    def take(self) -> PreforkedChild | None:
        """Give away who waits; None if nobody does."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.is_alive():
            waiting.close()
            return None
        return waiting

    def add_landlock_layer(self, rules: Iterable[landlock.Rule]) -> None:
        """Bind the calling process to `rules`, for ever, and who waits.

        Raises:
            LandlockMissing: the kernel has none.
            OSError: a rule can't be made, or the ruleset not enforced.
            ValueError: as landlock.enforce().
        """
        made = landlock.ruleset(rules, but=self._bound)
        try:
            landlock.enforce(made)
            if self._waiting is not None:
                self._waiting.add_landlock_layer(made)
        finally:
            os.close(made)

    def close(self) -> None:
        """Put down who waits."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.close()
