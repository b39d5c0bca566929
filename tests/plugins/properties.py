"""A pytest plugin: how properties are tried.

How long an example takes depends on what else the machine does, so neither is held against a test;
pytest's own time limit is.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("convertd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("convertd")
