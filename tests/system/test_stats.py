"""The counters: as an operator gets them by GetStats, and node_exporter from a file."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Final

from harness import waiting
from harness.agent import conversion
from harness.callers import ALICE, MALLORY, ROOT
from harness.daemon import Daemon
from harness.fixtures import MakeDaemon
from policies import IMAGES, LIBRARY, Grant, Policy
from prometheus_client import parser

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(operators=[0], grants=[Grant(read=[LIBRARY], write=[IMAGES])])

MIB: Final = 1024 * 1024

DASHBOARD: Final = Path(__file__).parents[2] / "packaging" / "grafana" / "convertd.json"


def stats(daemon: Daemon) -> pb.GetStatsResponse:
    """What the operator is told."""
    return daemon.agent(ROOT).ask("GetStats", pb.GetStatsRequest(), pb.GetStatsResponse)


def test_stats_count_conversions_and_refusals(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """By formats and reason; bytes and times are sums, and the buckets hold those before them."""
    began = time.time()
    daemon = make_daemon(POLICY)
    daemon.start()
    first = stats(daemon)
    assert began - 1 < first.start_time.ToSeconds() <= time.time()
    assert (first.jobs_running, first.jobs_queued, first.connections) == (0, 0, 1)
    assert (len(first.conversions), len(first.refusals)) == (0, 0)
    alice, mallory = daemon.agent(ALICE), daemon.agent(MALLORY)
    for name in ("one.qcow2", "two.qcow2"):
        alice.convert(conversion(library / "small.raw", images_dir / name)).result()
    again = conversion(library / "small.raw", images_dir / "one.qcow2")
    assert alice.convert(again).refusal().reason == "DEST_EXISTS"
    for _ in range(3):
        assert mallory.convert(again).refusal().reason == "PERMISSION_DENIED"
    # They are counted after the caller has its answer.
    waiting.until(lambda: sum(item.count for item in stats(daemon).conversions) == 3, "the counts")
    told = stats(daemon)
    assert told.start_time == first.start_time
    assert told.connections == 3
    counted = {
        (item.source_format, item.dest_format, item.reason, item.method): (item.count, item.bytes)
        for item in told.conversions
    }
    assert counted == {
        ("raw", "qcow2", "", pb.METHOD_COPY): (2, 16 * MIB),
        ("raw", "qcow2", "DEST_EXISTS", pb.METHOD_UNSPECIFIED): (1, 0),
    }
    assert [(item.reason, item.count) for item in told.refusals] == [("PERMISSION_DENIED", 3)]
    for item in told.conversions:
        assert item.seconds > 0
        buckets = [(bucket.upper_bound_seconds, bucket.count) for bucket in item.durations]
        assert buckets == sorted(buckets)
        assert buckets[-1] == (math.inf, item.count)


def test_stats_count_running_and_queued_jobs(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """At this moment."""
    daemon = make_daemon(POLICY.with_limits(jobs=1))
    daemon.start()
    alice = daemon.agent(ALICE)
    source = library / "bulky.raw"
    slow = conversion(source, images_dir / "running", rate_limit_bytes_per_second=MIB)
    running = alice.convert(slow)
    running.await_started()
    behind = alice.convert(conversion(source, images_dir / "behind"))
    behind.await_queued()
    told = stats(daemon)
    assert (told.jobs_running, told.jobs_queued) == (1, 1)
    for call in (behind, running):
        call.cancel()
        call.end()
    waiting.until(lambda: stats(daemon).jobs_running == 0, "nothing runs")
    assert stats(daemon).jobs_queued == 0


def test_stats_are_refused_to_an_unlisted_user(make_daemon: MakeDaemon) -> None:
    """They tell what others do."""
    daemon = make_daemon(POLICY)
    daemon.start()
    refusal = daemon.agent(MALLORY).call("GetStats", pb.GetStatsRequest()).refusal()
    assert (refusal.status, refusal.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert refusal.metadata["uid"] == "1666"


def test_dashboard_queries_only_existing_counters(
    make_daemon: MakeDaemon, library: Path, images_dir: Path
) -> None:
    """Their names, as the file has them that the daemon writes when it ends."""
    daemon = make_daemon(POLICY)
    file = daemon.home / "convertd.prom"
    with daemon.policy_path.open("a", encoding="utf-8") as policy:
        policy.write(str(Policy(service={"metrics": str(file)})))
    daemon.start()
    dest = images_dir / "dest.qcow2"
    daemon.agent(ALICE).convert(conversion(library / "small.raw", dest)).result()
    daemon.agent(MALLORY).convert(conversion(dest, dest)).refusal()
    daemon.stop()
    families = list(parser.text_string_to_metric_families(file.read_text(encoding="utf-8")))
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["convertd_conversion_bytes_total"] == 8 * MIB
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"convertd_\w+", target["expr"])
    }
    assert asked
    assert asked <= samples.keys()
