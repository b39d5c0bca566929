"""A pytest plugin: `--forbid-skips` makes every skip a failure.

A skip says that something was not shown. On the machine that decides, that is a failure.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import pytest

AnyReport = TypeVar("AnyReport", pytest.CollectReport, pytest.TestReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--forbid-skips", action="store_true", help="count a skipped test as failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge a test that skipped, by mark or while it ran."""
    report = yield
    # A test that is expected to fail is reported as skipped too, and is none.
    if hasattr(report, "wasxfail"):
        return report
    return judged(item.config, report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Judge a module that skipped as a whole."""
    report = yield
    return judged(collector.config, report)


def judged(config: pytest.Config, report: AnyReport) -> AnyReport:
    """Turn a skip into a failure, if skips are forbidden."""
    if report.skipped and config.getoption("--forbid-skips"):
        report.outcome = "failed"
        report.longrepr = f"skips are forbidden here: {report.longreprtext}"
    return report
