"""The policy's text: every key has its effect, and every mistake its key and a reason."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import values
from convertd_daemon.policy import bind, document, value_types

ROOT = """
[roots.images]
path = "/srv/images"
access = "daemon"
"""
DEVICES = """
[roots.devices]
path = "/dev/vg"
kind = "block"
access = "daemon"
"""
GRANT = """
[[grants]]
users = [1234]
read = ["images"]
"""
WHOLE = """
qemu_img = "/opt/qemu/bin/qemu-img"

[limits]
jobs = 1
jobs_per_user = 2
queue = 3
queue_per_user = 4
inspections = 5
inspections_per_user = 6
connections = 7
connections_per_user = 8
virtual_size = "9 GiB"
memory = "1.5 GiB"
stall = "11 s"
duration = "12 h"
inspect = "13 s"
stop_grace = "0.6 min"

[service]
metrics = "/run/convertd.prom"
idle_exit = "14 s"

[operators]
users = ["root", 5]
groups = ["wheel", "6"]

[roots.images]
path = "/srv/images"
kind = "files"
access = "daemon"
owner = "nova:36"
mode = "0640"
mounts = true
allow_ownerless = true
reflink = false
parents_writable_by = ["nova", 5, "group:kvm", "group:7"]

[roots.own]
path = "/srv/own"
access = "caller"
owner = "caller"

[roots.devices]
path = "/dev/vg"
kind = "block"
access = "daemon"
allow_is_zero = true

[[grants]]
users = ["nova"]
groups = ["kvm"]
read = ["images", "devices"]
write = ["own"]
read_formats = ["vmdk", "dmg"]
write_formats = ["vdi"]
overwrite = "any"

[[grants]]
groups = [7]
read = ["own"]
formats = ["vhdx"]
"""
IDS = bind.Ids(users={"root": 0, "nova": 107}, groups={"wheel": 10, "kvm": 108})


def test_each_policy_key_takes_effect() -> None:
    """The whole schema, from the text to the policy."""
    bound = bind.bind(document.parse(WHOLE), IDS)
    images, own, devices = bound.roots
    first, second = bound.rules
    assert bound.qemu_img == "/opt/qemu/bin/qemu-img"
    assert bound.limits == values.Limits(
        jobs=1,
        jobs_per_user=2,
        queue=3,
        queue_per_user=4,
        inspections=5,
        inspections_per_user=6,
        connections=7,
        connections_per_user=8,
        virtual_size_bytes=9 * 1024**3,
        memory_bytes=3 * 1024**3 // 2,
        stall_seconds=11.0,
        duration_seconds=12 * 3600.0,
        inspect_seconds=13.0,
    )
    assert bound.service == values.Service(
        metrics="/run/convertd.prom", idle_exit_s=14.0, stop_grace_s=36.0
    )
    assert (bound.operators.uids, bound.operators.gids) == (frozenset({0, 5}), frozenset({10, 6}))
    assert images == values.Root(
        name="images",
        path="/srv/images",
        access=values.RootAccess.DAEMON,
        owner=values.Owner(uid=107, gid=36),
        mode=0o640,
        mounts=True,
        allow_ownerless=True,
        reflink=False,
        parent_uids=frozenset({107, 5}),
        parent_gids=frozenset({108, 7}),
    )
    assert own == values.Root(name="own", path="/srv/own", access=values.RootAccess.CALLER)
    assert devices == values.Root(
        name="devices",
        path="/dev/vg",
        kind=values.RootKind.BLOCK,
        access=values.RootAccess.DAEMON,
        allow_is_zero=True,
    )
    assert (first.name, first.subjects.uids, first.subjects.gids) == (
        "grants[0]",
        frozenset({107}),
        frozenset({108}),
    )
    assert (first.read, first.write) == ((images, devices), (own,))
    assert (first.read_formats, first.write_formats) == (
        frozenset({"vmdk", "dmg"}),
        frozenset({"vdi"}),
    )
    assert first.overwrite is values.OverwriteScope.ANY
    assert (second.name, second.subjects.uids, second.subjects.gids) == (
        "grants[1]",
        frozenset(),
        frozenset({7}),
    )
    assert (second.read, second.write) == ((own,), ())
    assert second.read_formats == second.write_formats == frozenset({"vhdx"})


def test_missing_policy_key_has_its_default() -> None:
    """An empty policy is one: it grants nobody anything."""
    empty = bind.bind(document.parse(""), IDS)
    assert (empty.limits, empty.rules, empty.roots) == (values.DEFAULT_LIMITS, (), ())
    assert empty.service == values.Service()
    assert empty.qemu_img == "/usr/bin/qemu-img"
    assert empty.operators.uids == empty.operators.gids == frozenset()
    rule = bind.bind(document.parse(ROOT + GRANT), IDS).rules[0]
    assert rule.read_formats == rule.write_formats == frozenset({"raw", "qcow2"})
    assert rule.overwrite is values.OverwriteScope.OWN


def mistake_in(text: str | bytes) -> document.PolicyError:
    """The mistake that is found in a text."""
    with pytest.raises(document.PolicyError) as mistake:
        document.parse(text)
    key, reason = mistake.value.key, mistake.value.reason
    assert str(mistake.value) == (f"{key}: {reason}" if key else reason)
    return mistake.value


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("jobs = 4", "jobs", "is not a key of the policy"),
        ("limits = 4", "limits", "must be a table"),
        ("roots = 4", "roots", "must be a table"),
        ("[roots]\na = 4", "roots.a", "must be a table"),
        ("grants = 4", "grants", "must be a list"),
        ("grants = [4]", "grants[0]", "must be a table"),
        ("operators = []", "operators", "must be a table"),
        ('qemu_img = "qemu-img"', "qemu_img", "must be absolute"),
        ("qemu_img = 4", "qemu_img", "must be a string"),
        ('[roots.a]\npath = "/a"', "roots.a.access", "is missing"),
        ('[roots.a]\naccess = "daemon"', "roots.a.path", "is missing"),
        ('[roots."a b"]\npath = "/a"\naccess = "caller"', "roots", "'a b' is not a name"),
        (ROOT + ROOT.replace("images]", "b]"), "roots.b.path", "is that of roots.images too"),
        (ROOT + '[[grants]]\nread = ["images"]', "grants[0].users", "must name somebody"),
        (ROOT + "[[grants]]\nusers = [1]", "grants[0].read", "is missing"),
        (ROOT + "[[grants]]\nusers = [1]\nread = []", "grants[0].read", "must name a root"),
        (ROOT + '[[grants]]\nusers = [1]\nread = ["x"]', "grants[0].read", "there is no root 'x'"),
        (ROOT + GRANT + GRANT + "writ = []", "grants[1].writ", "is not a key of the policy"),
    ],
)
def test_policy_mistake_is_reported_with_key_and_reason(text: str, key: str, reason: str) -> None:
    """So that an operator finds the line."""
    mistake = mistake_in(text)
    assert mistake.key == key
    assert reason in mistake.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("roots", "is not TOML: ", id="without-a-value"),
        pytest.param(b"\xff", "is not TOML: ", id="not-in-utf-8"),
        pytest.param("a = " + "9" * 5000, "is not TOML: ", id="with-an-endless-number"),
        pytest.param("a = " + "[" * 5000, "is nested too deeply", id="nested-without-end"),
    ],
)
def test_invalid_toml_is_reported(text: str | bytes, reason: str) -> None:
    """There is no key then, but often a line."""
    mistake = mistake_in(text)
    assert mistake.key == ""
    assert reason in mistake.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('idle_exit = "0 s"', "must be at least 1 s"),
        ('idle_exit = "0.9 s"', "must be at least 1 s"),
        ("idle_exit = 60", "must be a string"),
        ('metrics = "run/convertd.prom"', "must be absolute"),
        ("watchdog = true", "is not a key of the policy"),
    ],
)
def test_service_setting_is_refused(line: str, reason: str) -> None:
    """What would end it at once, or lie nowhere."""
    mistake = mistake_in(f"[service]\n{line}")
    assert mistake.key == f"service.{line.split(maxsplit=1)[0]}"
    assert reason in mistake.reason


def test_service_settings_for_idle_exit_and_counters_are_accepted() -> None:
    """Neither is done by default."""
    said = document.parse('[service]\nidle_exit = "1 s"\nmetrics = "/run/convertd.prom"')
    assert (said.service.idle_exit, said.service.metrics) == (1.0, "/run/convertd.prom")
    silent = document.parse("").service
    assert (silent.idle_exit, silent.metrics) == (None, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("jobs = 0", "must be from 1 to 256"),
        ("jobs = 257", "must be from 1 to 256"),
        ("jobs = true", "must be a whole number"),
        ("jobs = 1.5", "must be a whole number"),
        ("jobs_per_usr = 1", "is not a key of the policy"),
        ("stall = 600", "must be a string"),
        ('stall = "600"', "is not a time"),
        ('stall = "1 m"', "a number and one of s, min, h, d"),
        ('stall = "-1 s"', "is not a time"),
        ('stall = "0.5 s"', "must be from 1 s to 7 d"),
        ('stall = "8 d"', "must be from 1 s to 7 d"),
        ('memory = "1 GB"', "is not a size"),
        ('memory = "1 KiB"', "must be from 64 MiB to 1 TiB"),
    ],
)
def test_limit_value_is_refused(line: str, reason: str) -> None:
    """When it has no unit, or makes no sense."""
    mistake = mistake_in(f"[limits]\n{line}")
    assert mistake.key == f"limits.{line.split(maxsplit=1)[0]}"
    assert reason in mistake.reason


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("jobs", ["1", "256"], ["0", "257"]),
        ("jobs_per_user", ["1", "256"], ["0", "257"]),
        ("queue", ["1", "65536"], ["0", "65537"]),
        ("queue_per_user", ["1", "65536"], ["0", "65537"]),
        ("inspections", ["1", "256"], ["0", "257"]),
        ("inspections_per_user", ["1", "256"], ["0", "257"]),
        ("connections", ["1", "65536"], ["0", "65537"]),
        ("connections_per_user", ["1", "65536"], ["0", "65537"]),
        ("virtual_size", ['"1 MiB"', '"1024 PiB"'], ['"1048575 B"', '"1024.001 PiB"']),
        ("memory", ['"64 MiB"', '"1 TiB"'], ['"67108863 B"', '"1099511627777 B"']),
        ("stall", ['"1 s"', '"7 d"'], ['"0.999 s"', '"604800.001 s"']),
        ("duration", ['"1 s"', '"365 d"'], ['"0.999 s"', '"31536000.001 s"']),
        ("inspect", ['"1 s"', '"1 h"'], ['"0.999 s"', '"3600.001 s"']),
        ("stop_grace", ['"0 s"', '"1 d"'], ['"86400.001 s"']),
    ],
)
def test_limit_bounds_are_inclusive(name: str, allowed: list[str], refused: list[str]) -> None:
    """Both ends are in."""
    for value in allowed:
        document.parse(f"[limits]\n{name} = {value}")
    for value in refused:
        mistake = mistake_in(f"[limits]\n{name} = {value}")
        assert (mistake.key, mistake.reason[:13]) == (f"limits.{name}", "must be from ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("mode = 600", "must be a string"),
        ('mode = "600"', "must be four octal digits"),
        ('mode = "0700"', "has bits outside of 0666"),
        ('mode = "4600"', "must be four octal digits"),
        ('owner = "nova"', 'of the form "user:group"'),
        ('owner = "a:b:c"', 'of the form "user:group"'),
        ('owner = ":a"', "neither a name"),
        ('owner = "65534:1"', "the id 65534 is not allowed"),
        ('parents_writable_by = "nova"', "must be a list in brackets"),
        ("parents_writable_by = [true]", "must be a string"),
        ('parents_writable_by = ["a:b"]', "is neither a name"),
        ('parents_writable_by = ["group:"]', "is neither a name"),
        ('parents_writable_by = ["group:65534"]', "the id 65534 is not allowed"),
        ("mounts = 1", "must be true or false"),
        ("allow_is_zero = true", "has no meaning for a root of kind files"),
        ('kind = "dir"', "'dir' is not one of the values"),
        ('size = "x"', "is not a key of the policy"),
    ],
)
def test_root_of_files_is_refused_with(line: str, reason: str) -> None:
    """Nor what can't be, nor what has no effect."""
    mistake = mistake_in(ROOT + line)
    assert mistake.key.startswith(f"roots.images.{line.split(maxsplit=1)[0]}")
    assert reason in mistake.reason


@pytest.mark.parametrize(
    "line",
    [
        'owner = "caller"',
        'mode = "0600"',
        "mounts = false",
        "allow_ownerless = false",
        "reflink = true",
    ],
)
def test_root_of_devices_is_refused_with(line: str) -> None:
    """For nothing is created there."""
    mistake = mistake_in(DEVICES + line)
    assert mistake.key == f"roots.devices.{line.split(maxsplit=1)[0]}"
    assert "has no meaning for a root of kind block" in mistake.reason


def test_root_access_is_daemon_or_caller() -> None:
    """And what a caller creates with its own rights is nobody else's."""
    root = '[roots.a]\npath = "/a"\naccess = "{}"\n'
    assert mistake_in(root.format("own")).key == "roots.a.access"
    assert mistake_in(root.format("caller") + 'owner = "nova:kvm"').key == "roots.a.owner"


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ('write = ["x"]', "write", "there is no root 'x'"),
        ('wri = ["x"]', "wri", "is not a key of the policy"),
        ('formats = "raw"', "formats", "must be a list"),
        ('formats = ["iso"]', "formats[0]", "'iso' is not a format that convertd writes"),
        ('formats = ["raw", "dmg"]', "formats[1]", "'dmg' is not a format that convertd writes"),
        ('read_formats = ["iso"]', "read_formats[0]", "'iso' is not a format that convertd reads"),
        ('write_formats = ["dmg"]', "write_formats[0]", "is not a format that convertd writes"),
        ("formats = []", "formats", "must name a format"),
        ("read_formats = []", "read_formats", "must name a format"),
        ('formats = ["raw"]\nread_formats = ["raw"]', "formats", "can't be combined with"),
        ('formats = ["raw"]\nwrite_formats = ["raw"]', "formats", "can't be combined with"),
        ('overwrite = "all"', "overwrite", "'all' is not one of the values"),
    ],
)
def test_grant_is_refused_with(line: str, key: str, reason: str) -> None:
    """Nor what can't be, nor what could be read in two ways."""
    mistake = mistake_in(ROOT + GRANT + line)
    assert mistake.key == f"grants[0].{key}"
    assert reason in mistake.reason


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ("users = 5", "users", "must be a list"),
        ("users = [1.5]", "users[0]", "must be a string"),
        ('users = [1, ""]', "users[1]", "neither a name"),
        ('users = ["a\\u0000"]', "users[0]", "neither a name"),
        ("users = [-1]", "users[0]", "neither a name"),
        ("users = [65534]", "users[0]", "the id 65534 is not allowed"),
        ('users = ["65534"]', "users[0]", "the id 65534 is not allowed"),
        ("users = [4294967295]", "users[0]", "is higher than 4294967294"),
        ("groups = [65534]", "groups[0]", "the id 65534 is not allowed"),
    ],
)
def test_overflow_id_can_not_be_an_operator_by(line: str, key: str, reason: str) -> None:
    """The same holds for the users and groups of a grant."""
    mistake = mistake_in(f"[operators]\n{line}")
    assert mistake.key == f"operators.{key}"
    assert reason in mistake.reason


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/run", "/dev", "/etc", "/usr", "/proc", "/sys", "/boot", "/bin", "/lib", "/sbin"),
        *("/etc/convertd", "/usr/share", "/proc/1", "/sys/kernel", "/boot/efi", "/lib/modules"),
        *("/dev/vg", "/dev/mapper/x"),
        *("images", "./images", "/srv/", "/srv//images", "/srv/./images", "/srv/../etc", "", "//"),
        *("/srv/a\\u0000", "/srv/a\\n", "/" + "a/" * 2048 + "a"),
    ],
)
@pytest.mark.parametrize("access", ["daemon", "caller"])
def test_directory_is_refused_as_a_root_of_files(path: str, access: str) -> None:
    """Whoever may write there owns the machine; or it can't be told what is meant."""
    with pytest.raises(document.PolicyError) as mistake:
        document.parse(f'[roots.a]\npath = "{path}"\naccess = "{access}"')
    assert mistake.value.key == "roots.a.path"


@pytest.mark.parametrize("path", ["/", "/run", "/dev"])
def test_directory_that_is_too_wide_for_a_root_is_refused(path: str) -> None:
    """It is a path like others; what is wrong is what it means."""
    mistake = mistake_in(f'[roots.a]\npath = "{path}"\naccess = "daemon"')
    assert mistake.reason == f"{path} is too wide for a root; choose a directory in it"


@pytest.mark.parametrize(
    "path",
    ["/srv", "/var/lib/nova/instances", "/run/images", "/etcetera", "/usr2", "/devices", "/ä b"],
)
def test_directory_is_accepted_as_a_root_of_files(path: str) -> None:
    """Also where its name begins like that of a forbidden one."""
    parsed = document.parse(f'[roots.a]\npath = "{path}"\naccess = "daemon"')
    assert parsed.roots["a"].path == path


@pytest.mark.parametrize("path", ["/dev", "/srv/images", "/", "/devices"])
def test_directory_is_refused_as_a_root_of_devices(path: str) -> None:
    """Devices are below /dev; all of /dev is every disk of the machine."""
    with pytest.raises(document.PolicyError) as mistake:
        document.parse(f'[roots.a]\npath = "{path}"\nkind = "block"\naccess = "daemon"')
    assert mistake.value.key == "roots.a.path"


LINES = (
    *("", "[limits]", "[operators]", "[roots]", "[roots.a]", "[roots.b]", "[[grants]]", "[grants]"),
    *("jobs = 3", "jobs = -3", 'stall = "1 s"', 'stall = "x"', "stall = inf", "memory = nan"),
    *('path = "/srv/a"', 'path = "/"', "path = []", "path = 1979-05-27", 'access = "caller"'),
    *('access = "daemon"', 'kind = "block"', 'owner = "a:b"', 'owner = "a:b:c"', 'mode = "0640"'),
    *('users = ["root", 1]', "users = [[1]]", "groups = [99999999999999999999]", "groups = [{}]"),
    *('read = ["a"]', 'read = ["a", "b"]', 'write = ["b"]', 'formats = ["raw"]', "formats = {}"),
    *('overwrite = "any"', 'qemu_img = "/x"', "roots = 1", "a.b.c = 1", '"" = 1', "[roots.'']"),
)
"""Pieces that make more of a policy than chance would."""


@given(
    st.one_of(
        st.text(),
        st.text(st.characters(exclude_categories=())),
        st.binary(),
        st.lists(st.sampled_from(LINES), max_size=12).map("\n".join),
    )
)
def test_random_text_is_a_policy_or_a_policy_error(text: str | bytes) -> None:
    """The daemon reads it as root."""
    with contextlib.suppress(document.PolicyError):
        parsed = document.parse(text)
        bind.bind(parsed, bind.Ids(users={}, groups={}))


@given(st.integers(0, 1024), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB", "PiB"]))
def test_size_with_a_unit_is_parsed(number: int, unit: str) -> None:
    """To the byte, with or without a space."""
    expected = number * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert (
        value_types.Size.of(f"{number} {unit}")
        == value_types.Size.of(f"{number}{unit}")
        == expected
    )


@given(st.integers(0, 1024), st.sampled_from([("s", 1), ("min", 60), ("h", 3600), ("d", 86400)]))
def test_time_with_a_unit_is_parsed(number: int, unit: tuple[str, int]) -> None:
    """In seconds; halves too."""
    name, seconds = unit
    assert value_types.Duration.of(f"{number} {name}") == float(number * seconds)
    assert value_types.Duration.of(f"{number}.5 {name}") == (number + 0.5) * seconds
