"""`python -m convertd_daemon.front`: see main."""

import sys

# No TLS on a Unix socket: asyncio does without, where it can't be imported. OpenSSL would come with
# it, 5 MiB and 15 ms; also with hashlib, and with what imports that.
sys.modules["ssl"] = None  # type: ignore[assignment]

from convertd_daemon.front import main  # noqa: E402

raise SystemExit(main.main())
