"""A pytest plugin: how properties are tried.

How long an example takes depends on what else the machine does, so no example has a time limit;
pytest's own holds for the whole test. CONVERTD_TEST_EXAMPLES says how many there are.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "convertd",
    max_examples=int(os.environ.get("CONVERTD_TEST_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("convertd")
