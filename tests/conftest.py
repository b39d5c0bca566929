"""What every test has."""

from __future__ import annotations

pytest_plugins = ("forbid_skips", "properties", "harness.fixtures", "pytester")
