"""Print the results of calls for people."""

from __future__ import annotations

import contextlib
import pwd
import shlex

import click

from convertd_client import results
from convertd_client.cli import text

RIGHTS = {results.RootAccess.DAEMON: "the daemon's", results.RootAccess.CALLER: "your own"}
SCOPES = {results.OverwriteScope.OWN: "your own files", results.OverwriteScope.ANY: "any file"}

BY_QEMU_IMG = frozenset({results.Method.QEMU_IMG, results.Method.UNSPECIFIED})
"""The methods to which cache modes and the command apply. An older daemon does not tell it."""


def result(dest: str, done: results.ConvertResult) -> None:
    """Print what a conversion did, in one line."""
    kind = f"{done.dest_format} of {text.size(done.virtual_size_bytes)}"
    shares = done.method is results.Method.REFLINK
    if not done.published:
        facts = [f"would be {kind}", *(["blocks shared with the source"] if shares else [])]
    else:
        on_disk = f"{text.size(done.allocated_size_bytes)} on disk"
        shared = f", {text.size(done.shared_bytes)} of it shared with the source" if shares else ""
        speed = f"{text.duration(done.elapsed_seconds)} at {text.rate(done.bytes_per_second)}"
        facts = [kind, on_disk + shared, speed]
    if done.method in BY_QEMU_IMG:
        facts.append(f"cache mode {done.dest_cache.mode} ({done.dest_cache.reason})")
    facts += ["verified"] if done.verified else []
    click.echo(text.shown(f"{dest}: {', '.join(facts)}"))


def plan(planned: results.Plan) -> None:
    """Print what a conversion would do."""
    chain = [f"{item.path} ({item.format})" for item in planned.chain]
    rows = [
        ("source", " <- ".join(chain) or planned.source_format),
        ("method", f"{planned.method}: {planned.method_reason or 'not said'}"),
        ("compression", str(planned.compression)),
        ("needs", _needs(planned)),
    ]
    if planned.method in BY_QEMU_IMG:
        rows += [
            ("source cache", f"{planned.source_cache.mode}: {planned.source_cache.reason}"),
            ("dest cache", f"{planned.dest_cache.mode}: {planned.dest_cache.reason}"),
            ("command", shlex.join(planned.command)),
        ]
    _facts(rows)


def _needs(planned: results.Plan) -> str:
    if not planned.needed_bytes:
        return "nothing" if planned.method is results.Method.REFLINK else "unknown"
    needed, available = text.size(planned.needed_bytes), text.size(planned.available_bytes)
    return f"{needed} of {available} free"


def image(info: results.ImageInfo) -> None:
    """Print the description of an image."""
    click.echo(text.shown(f"{info.path}: {info.format}"))
    flags = {
        "encrypted": info.encrypted,
        "not closed in order": info.dirty,
        "corrupt": info.corrupt,
        "compressed": info.compressed,
    }
    rows = [
        ("virtual size", f"{text.size(info.virtual_size_bytes)} ({info.virtual_size_bytes} bytes)"),
        ("on disk", text.size(info.actual_size_bytes)),
        ("cluster size", text.size(info.cluster_size_bytes) if info.cluster_size_bytes else ""),
        ("state", ", ".join(name for name, is_so in flags.items() if is_so)),
        ("backing file", _backing(info)),
        ("snapshots", ", ".join(_snapshot(item) for item in info.snapshots)),
        ("bitmaps", ", ".join(_bitmap(item) for item in info.bitmaps)),
        ("options", ", ".join(f"{key}={item}" for key, item in info.format_specific.items())),
    ]
    _facts([(name, value) for name, value in rows if value])


def _snapshot(item: results.Snapshot) -> str:
    return f"{item.name} ({text.moment(item.create_time)})" if item.create_time else item.name


def _bitmap(item: results.Bitmap) -> str:
    facts = (f"{text.size(item.granularity_bytes)} a bit", *item.flags)
    return f"{item.name} ({', '.join(facts)})"


def _backing(info: results.ImageInfo) -> str:
    kind = f" ({info.backing_format})" if info.backing_format else ""
    return f"{info.backing_filename}{kind}" if info.backing_filename else ""


def jobs(listed: tuple[results.Job, ...]) -> None:
    """Print the jobs that wait or run."""
    if not listed:
        click.echo("no jobs")
        return
    rows = [("ID", "USER", "STATE", "SINCE", "SOURCE", "DEST", "LABEL")]
    rows += [
        (
            text.shown(job.job_id),
            _user(job.uid),
            _state(job),
            text.moment(job.start_time or job.create_time),
            text.shown(job.source_path),
            text.shown(f"{job.dest_path} ({job.dest_format})"),
            text.shown(job.label),
        )
        for job in listed
    ]
    click.echo(text.table(rows))


def _state(job: results.Job) -> str:
    if job.state is results.JobState.QUEUED:
        return f"queued, {job.progress.queue_position} before it"
    if job.state is results.JobState.RUNNING and job.progress.phase.value != "unspecified":
        return f"{job.progress.phase} {job.progress.percent:.0f} %"
    return str(job.state)


def access(answer: results.Access) -> None:
    """Print the caller's identity and grants."""
    operator = ", an operator: you see and cancel everyone's jobs" if answer.is_operator else ""
    groups = " ".join(str(group) for group in answer.groups)
    click.echo(f"you are {_user(answer.uid)} (uid {answer.uid}, gid {answer.gid}){operator}")
    versions = answer.versions
    limits = answer.limits
    _facts(
        [
            ("groups", groups or "none"),
            ("daemon", f"convertd {versions.daemon}, qemu-img {versions.qemu_img}"),
            ("kernel", f"{versions.kernel}, Landlock {versions.landlock_abi}"),
            ("compression", ", ".join(answer.compressions) or "none"),
            ("jobs at once", f"{limits.jobs}, {limits.jobs_per_user} of one user"),
            ("virtual size", f"at most {text.size(limits.virtual_size_bytes)}"),
        ]
    )
    if not answer.grants:
        click.echo("you may convert nothing: no grant of the policy names you")
    for grant in answer.grants:
        _grant(grant)


def _grant(grant: results.Grant) -> None:
    click.echo(text.shown(f"you may, by {grant.rule or 'a grant'}:"))
    for root in grant.roots:
        doing = {"read": root.may_read, "write": root.may_write}
        verbs = " and ".join(verb for verb, is_so in doing.items() if is_so)
        kind = " devices" if root.kind is results.RootKind.BLOCK else ""
        rights = RIGHTS.get(root.access, "unknown")
        click.echo(text.shown(f"  {verbs}{kind} below {root.path}, with {rights} rights"))
    rows = [
        ("formats read", ", ".join(grant.read_formats)),
        ("formats written", ", ".join(grant.write_formats)),
        ("overwrite", SCOPES.get(grant.overwrite, "nothing")),
    ]
    _facts(rows)


def _facts(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(text.shown(f"  {name.ljust(width)}  {value}"))


def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return text.shown(pwd.getpwuid(uid).pw_name)
    return str(uid)
