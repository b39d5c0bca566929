"""The counters in Prometheus' text format. A large import, so imported only where it is used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import core

from convertd_daemon.service import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_core import messages
    from convertd_daemon.service.metrics import Counters


def text(counters: Counters, now: messages.Stats) -> bytes:
    """Everything, as node_exporter's text-file collector reads it."""
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(_families(counters, now))))
    return prometheus_client.generate_latest(registry)


class _Families:
    """What a registry asks for its metrics."""

    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


def _families(counters: Counters, now: messages.Stats) -> Iterator[Any]:
    yield _gauge("start_time_seconds", "When the daemon started.", now.start_time.timestamp())
    yield _gauge("jobs_running", "Conversions that run.", now.jobs_running)
    yield _gauge("jobs_queued", "Conversions that wait.", now.jobs_queued)
    yield _gauge("connections", "Open connections.", now.connections)
    names = metrics.Kind._fields
    sizes = core.CounterMetricFamily(
        "convertd_conversion_bytes", "Virtual sizes of ended conversions.", labels=names
    )
    shared = core.CounterMetricFamily(
        "convertd_shared_bytes", "What results share with their sources.", labels=names
    )
    times = core.HistogramMetricFamily(
        "convertd_conversion_seconds", "Running times of ended conversions.", labels=names
    )
    for kind, ended in counters.conversions.items():
        labels = ["" if value is None else str(value) for value in kind]
        sizes.add_metric(labels, ended.virtual_bytes)
        shared.add_metric(labels, ended.shared_bytes)
        buckets = [
            ("+Inf" if math.isinf(bound) else f"{bound:g}", count)
            for bound, count in ended.cumulative()
        ]
        times.add_metric(labels, buckets, ended.seconds)
    refusals = core.CounterMetricFamily(
        "convertd_refusals", "Requests refused before a job began.", labels=("reason",)
    )
    for reason, count in counters.refusals.items():
        refusals.add_metric((reason,), count)
    yield from (sizes, shared, times, refusals)


def _gauge(name: str, meaning: str, value: float) -> core.GaugeMetricFamily:
    return core.GaugeMetricFamily(f"convertd_{name}", meaning, value=value)
