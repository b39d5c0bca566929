"""`python -m convertd_daemon.front`: see main."""

import sys

# No TLS on a Unix socket: asyncio does without, where it can't be imported. With it came OpenSSL,
# 5 MiB and 15 ms.
sys.modules["ssl"] = None  # type: ignore[assignment]

from convertd_daemon.front import main  # noqa: E402

raise SystemExit(main.main())
