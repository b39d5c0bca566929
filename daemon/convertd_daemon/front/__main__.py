"""`python -m convertd_daemon.front`: see main."""

import sys

# A Unix socket needs no TLS, and asyncio works without the ssl module. It (like hashlib) would load
# OpenSSL: 5 MiB and 15 ms.
sys.modules["ssl"] = None  # type: ignore[assignment]

from convertd_daemon.front import main  # noqa: E402

raise SystemExit(main.main())
