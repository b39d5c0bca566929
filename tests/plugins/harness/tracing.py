"""strace on a running daemon: to fail system calls, to slow them down, and to see that they came.

Whatever they fork is followed. Source: strace(1), "Tampering".
"""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from harness import waiting


class Tracer:
    """strace, attached to a process and what it will fork, for as long as the context lasts.

    `inject` is what strace's option of that name takes: system calls, and what becomes of them; or
    several of that, blanks between.
    With `path`, only calls about that path, or about a descriptor of it, are touched.
    """

    def __init__(
        self, pids: Iterable[int], inject: str, path: Path | None = None, *, follow: bool = True
    ) -> None:
        """Attach when the context is entered; without `follow`, to these processes alone."""
        self._text = ""
        self._pids = list(pids)
        self._argv = ["strace", *(("-f",) if follow else ())]
        for traced in self._pids:
            self._argv += ["-p", str(traced)]
        every = inject.split()
        self._argv += ["-e", f"trace={','.join(one.partition(':')[0] for one in every)}"]
        for one in every:
            self._argv += ["-e", f"inject={one}"]
        if path is not None:
            self._argv += ["-P", str(path)]

    def __enter__(self) -> Self:
        self._said = tempfile.NamedTemporaryFile()
        self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stderr=self._said)
        every = len(self._pids)
        waiting.until(lambda: self.text.count(" attached") == every, "strace is attached")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(waiting.DEADLINE_S)
        self._text = self.text
        self._said.close()

    @property
    def text(self) -> str:
        """What strace has written."""
        if self._said.closed:
            return self._text
        return Path(self._said.name).read_text(errors="replace")

    @property
    def injected(self) -> int:
        """How many calls were failed."""
        return len(re.findall(r"\(INJECTED\)", self.text))
