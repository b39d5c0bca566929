"""What calls return: plain, frozen values, named as the contract names them."""

from __future__ import annotations

from convertd_core.results import *  # noqa: F403
