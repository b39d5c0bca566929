"""Know that a forked child has closed what it was not to have.

fork(2) gives a child a copy of each descriptor, so that for a moment it may be the last to have one
that the broker closes. What is behind it would then be cleaned up in the child, which may take as
long as a stranger likes: see closer.py. So the broker closes nothing before the child has.
"""

from __future__ import annotations

import os


class Emptied:
    """A pipe to be made before fork(2). Parent and child each call one of the methods, once."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self._reader, self.writer = os.pipe()

    def tell(self) -> None:
        """In the child: all is closed but what it keeps, and `writer`, which goes now."""
        os.close(self.writer)

    def wait(self) -> None:
        """In the parent: wait for that, or for the child's death. It takes about a millisecond."""
        os.close(self.writer)
        os.read(self._reader, 1)
        os.close(self._reader)

    def give_up(self) -> None:
        """In the parent: there is no child."""
        os.close(self.writer)
        os.close(self._reader)
