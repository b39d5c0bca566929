"""`python -m convertd_daemon.front`: see main."""

from convertd_daemon.front import main

raise SystemExit(main.main())
