"""`python -m convertd_daemon.job`: see main."""

from convertd_daemon.job import main

raise SystemExit(main.main())
