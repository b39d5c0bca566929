"""The programs of the environment that has convertd installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(sys.executable).parent.resolve()
"""Where they are, without links: a link below somebody's home can't be followed by other users.

The interpreter itself is a link that has to stay one: by its directory it knows its packages.
"""

PYTHON: Final = str(DIRECTORY / Path(sys.executable).name)
CONVERTCTL: Final = str(DIRECTORY / "convertctl")
CONVERTD: Final = DIRECTORY / "convertd"
GRPCURL: Final = str(DIRECTORY / "grpcurl")
