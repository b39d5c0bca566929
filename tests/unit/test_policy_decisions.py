"""Who may convert what: deny by default, one rule for both ends, the longest root alone."""

from __future__ import annotations

import dataclasses
import pathlib

import grants
import pytest
import refusals
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import conditions, results, values
from convertd_daemon.policy import decide

ROOTS = {
    path: values.Root(name=path.replace("/", "_"), path=path, access=values.RootAccess.DAEMON)
    for path in ("/a", "/a/b", "/a/b/c", "/ab", "/d")
}
PATHS = ("/a", "/a/x", "/a/b", "/a/b/x", "/a/b/c/x", "/a/bc", "/ab/x", "/d/x", "/d/y/z", "/e/x")
UIDS = (0, 1, 2, values.OVERFLOW_ID)
GIDS = (10, 11, values.OVERFLOW_ID)
FORMATS = ("raw", "qcow2", "vmdk")


def subsets(ids: tuple[int, ...]) -> st.SearchStrategy[frozenset[int]]:
    """Some of the values."""
    return st.frozensets(st.sampled_from(ids))


some_roots = st.lists(st.sampled_from(list(ROOTS.values())), unique=True).map(tuple)
some_formats = st.frozensets(st.sampled_from(FORMATS))
some_subjects = st.builds(decide.Subjects, uids=subsets(UIDS), gids=subsets(GIDS))
some_rules = st.builds(
    decide.Rule,
    name=st.uuids().map(str),
    subjects=some_subjects,
    read=some_roots,
    write=some_roots,
    read_formats=some_formats,
    write_formats=some_formats,
    overwrite=st.sampled_from([values.OverwriteScope.OWN, values.OverwriteScope.ANY]),
)
some_policies = st.builds(
    decide.Policy,
    limits=st.just(values.DEFAULT_LIMITS),
    operators=some_subjects,
    roots=st.permutations(list(ROOTS.values())).map(tuple),
    rules=st.lists(some_rules, max_size=4).map(tuple),
    qemu_img=st.just("/usr/bin/qemu-img"),
)
some_peers = st.builds(
    values.Peer,
    uid=st.sampled_from(UIDS),
    gid=st.sampled_from(GIDS),
    groups=subsets(GIDS),
    pid=st.just(1),
)
some_sources = st.builds(
    values.Source, path=st.sampled_from(PATHS), format=st.sampled_from(("", *FORMATS))
)
some_dests = st.builds(
    values.Destination, path=st.sampled_from(PATHS), format=st.sampled_from(FORMATS)
)
some_requests = st.builds(values.ConvertRequest, source=some_sources, dest=some_dests).filter(
    lambda request: request.source.path != request.dest.path
)
some_inspections = st.builds(values.InspectRequest, source=some_sources)

PEER = values.Peer(uid=1, gid=10, groups=frozenset({10}), pid=1)


def rule(**changes: object) -> decide.Rule:
    """A rule that allows uid 1 all that the tests below ask for, but for the changes."""
    wide = decide.Rule(
        name="grants[0]",
        subjects=decide.Subjects(uids=frozenset({1})),
        read=(ROOTS["/a"], ROOTS["/d"]),
        write=(ROOTS["/a"], ROOTS["/d"]),
        read_formats=frozenset({"raw", "qcow2"}),
        write_formats=frozenset({"raw", "qcow2"}),
        overwrite=values.OverwriteScope.OWN,
    )
    return dataclasses.replace(wide, **changes)  # type: ignore[arg-type]


def policy_of(*rules: decide.Rule) -> decide.Policy:
    """A policy of these rules, with all the roots."""
    return decide.Policy(
        limits=grants.limits(jobs=3),
        operators=decide.Subjects(uids=frozenset({7}), gids=frozenset({70})),
        roots=tuple(ROOTS.values()),
        rules=rules,
        qemu_img="/usr/bin/qemu-img",
    )


def request(
    source: str = "/a/x", dest: str = "/d/x", source_format: str = "raw", dest_format: str = "qcow2"
) -> values.ConvertRequest:
    """A request that the rule above allows."""
    return values.ConvertRequest(
        source=values.Source(path=source, format=source_format),
        dest=values.Destination(path=dest, format=dest_format),
    )


def decision(
    a_policy: decide.Policy, peer: values.Peer, asked: values.ConvertRequest
) -> values.ConvertGrant | None:
    """The grant, or None for a refusal."""
    try:
        return decide.decide(a_policy, peer, asked)
    except conditions.PermissionDenied:
        return None


def inspection(
    a_policy: decide.Policy, peer: values.Peer, asked: values.InspectRequest
) -> values.InspectGrant | None:
    """The grant, or None for a refusal."""
    try:
        return decide.decide_inspect(a_policy, peer, asked)
    except conditions.PermissionDenied:
        return None


def root_of(path: str) -> values.Root | None:
    """Which root decides about a path, found in another way than the policy does."""
    for parent in pathlib.PurePosixPath(path).parents:
        if str(parent) in ROOTS:
            return None if path in ROOTS else ROOTS[str(parent)]
    return None


def allows(a_rule: decide.Rule, peer: values.Peer, asked: values.ConvertRequest) -> bool:
    """Whether a rule allows a request, said in another way than the policy does."""
    by_uid = peer.uid in a_rule.subjects.uids
    mapped = {peer.gid, *peer.groups}.difference({values.OVERFLOW_ID})
    by_group = bool(mapped.intersection(a_rule.subjects.gids))
    return (
        (by_uid or by_group)
        and peer.uid != values.OVERFLOW_ID
        and root_of(asked.source.path) in a_rule.read
        and root_of(asked.dest.path) in a_rule.write
        and asked.source.format in {"", *a_rule.read_formats}
        and asked.dest.format in a_rule.write_formats
    )


@given(some_policies, some_peers, some_requests)
def test_grant_needs_one_rule_that_allows_user_roots_and_formats(
    a_policy: decide.Policy, peer: values.Peer, asked: values.ConvertRequest
) -> None:
    """No request yields a grant outside of its users, roots or formats; none inside is refused."""
    first = next((each for each in a_policy.rules if allows(each, peer, asked)), None)
    grant = decision(a_policy, peer, asked)
    assert (grant and grant.rule) == (first and first.name)


@given(some_policies, some_peers, some_requests)
def test_rights_of_two_rules_never_combine(
    a_policy: decide.Policy, peer: values.Peer, asked: values.ConvertRequest
) -> None:
    """All rules together allow what one of them alone allows, and nothing else."""
    alone = [
        decision(dataclasses.replace(a_policy, rules=(each,)), peer, asked)
        for each in a_policy.rules
    ]
    assert decision(a_policy, peer, asked) == next((grant for grant in alone if grant), None)


@given(some_policies, some_peers, some_requests)
def test_grant_has_only_values_of_its_rule_and_request(
    a_policy: decide.Policy, peer: values.Peer, asked: values.ConvertRequest
) -> None:
    """A grant carries nothing of another rule, caller or request."""
    if grant := decision(a_policy, peer, asked):
        (origin,) = (each for each in a_policy.rules if each.name == grant.rule)
        assert (grant.peer, grant.request, grant.limits) == (peer, asked, a_policy.limits)
        assert (grant.source.path, grant.dest.path) == (asked.source.path, asked.dest.path)
        assert (grant.source.root, grant.dest.root) == (
            root_of(asked.source.path),
            root_of(asked.dest.path),
        )
        assert (grant.readable, grant.read_formats) == (origin.read, origin.read_formats)
        assert grant.overwrite is origin.overwrite
        assert {*grant.readable, *grant.closed} == set(a_policy.roots)
        assert not {*grant.readable} & {*grant.closed}


@given(some_policies, some_peers, some_inspections)
def test_inspection_needs_one_rule_that_allows_reading(
    a_policy: decide.Policy, peer: values.Peer, asked: values.InspectRequest
) -> None:
    """To inspect is to read."""
    readers = [
        dataclasses.replace(each, write=(ROOTS["/d"],), write_formats=frozenset({"raw"}))
        for each in a_policy.rules
    ]
    as_source = values.ConvertRequest(
        source=asked.source, dest=values.Destination(path="/d/elsewhere", format="raw")
    )
    first = next((each for each in readers if allows(each, peer, as_source)), None)
    grant = inspection(a_policy, peer, asked)
    assert (grant and grant.rule) == (first and first.name)
    if grant and first:
        assert (grant.peer, grant.request, grant.limits) == (peer, asked, a_policy.limits)
        assert (grant.source.path, grant.source.root) == (
            asked.source.path,
            root_of(asked.source.path),
        )
        assert (grant.readable, grant.read_formats) == (first.read, first.read_formats)
        assert {*grant.readable, *grant.closed} == set(a_policy.roots)


@given(some_peers, some_requests)
def test_policy_without_rules_refuses_everything(
    peer: values.Peer, asked: values.ConvertRequest
) -> None:
    """Deny is what the policy starts from."""
    with pytest.raises(conditions.PermissionDenied):
        decide.decide(policy_of(), peer, asked)
    with pytest.raises(conditions.PermissionDenied):
        decide.decide_inspect(policy_of(), peer, values.InspectRequest(source=asked.source))


def test_control_the_test_rule_allows_the_test_request() -> None:
    """The control: the rule that the tests below narrow allows the request that they make."""
    grant = decide.decide(policy_of(rule()), PEER, request())
    assert (grant.source.below, grant.dest.below) == ("x", "x")
    assert (grant.source.root, grant.dest.root) == (ROOTS["/a"], ROOTS["/d"])


@pytest.mark.parametrize(
    "narrowed",
    [
        pytest.param({"subjects": decide.Subjects(uids=frozenset({2}))}, id="for-another-uid"),
        pytest.param({"subjects": decide.Subjects(gids=frozenset({11}))}, id="for-another-group"),
        pytest.param({"read": (ROOTS["/d"],)}, id="reading-elsewhere"),
        pytest.param({"write": (ROOTS["/a"],)}, id="writing-elsewhere"),
        pytest.param({"read_formats": frozenset({"qcow2"})}, id="reading-another-format"),
        pytest.param({"write_formats": frozenset({"raw"})}, id="writing-another-format"),
    ],
)
def test_rule_does_not_allow(narrowed: dict[str, object]) -> None:
    """Each part of a rule is needed."""
    with pytest.raises(conditions.PermissionDenied):
        decide.decide(policy_of(rule(**narrowed)), PEER, request())


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(values.Peer(uid=5, gid=10, groups=frozenset(), pid=1), id="primary"),
        pytest.param(
            values.Peer(uid=5, gid=9, groups=frozenset({8, 10}), pid=1), id="supplementary"
        ),
    ],
)
def test_rule_for_a_group_applies_to_its_members_by(peer: values.Peer) -> None:
    """The kernel says of which groups a caller is."""
    grouped = rule(subjects=decide.Subjects(gids=frozenset({10})))
    assert decide.decide(policy_of(grouped), peer, request()).rule == "grants[0]"


def test_overflow_uid_is_granted_nothing_even_if_a_rule_names_it() -> None:
    """65534 is what the kernel says for any uid of another user namespace."""
    anybody = decide.Subjects(uids=frozenset({65534}), gids=frozenset({10, 65534}))
    unmapped = values.Peer(uid=65534, gid=65534, groups=frozenset({10, 65534}), pid=1)
    open_to_it = dataclasses.replace(policy_of(rule(subjects=anybody)), operators=anybody)
    assert decision(open_to_it, unmapped, request()) is None
    assert not decide.is_operator(open_to_it, unmapped)


def test_overflow_gid_is_a_member_of_no_granted_group() -> None:
    """65534 is what the kernel says for any gid of another user namespace, too."""
    grouped = rule(subjects=decide.Subjects(gids=frozenset({65534})))
    for gid, groups in ((65534, frozenset[int]()), (9, frozenset({65534}))):
        peer = values.Peer(uid=5, gid=gid, groups=groups, pid=1)
        assert decision(policy_of(grouped), peer, request()) is None


def test_nested_root_not_named_by_the_rule_is_closed() -> None:
    """The longest root is the only one asked: /a allows nothing in /a/b."""
    assert decision(policy_of(rule()), PEER, request(source="/a/b/x")) is None
    assert decision(policy_of(rule()), PEER, request(dest="/a/b/x", source="/d/x")) is None


def test_grant_has_all_other_roots() -> None:
    """So that the way to its files can be held against them."""
    whole = policy_of(rule())
    grant = decide.decide(whole, PEER, request())
    for place in (grant.source, grant.dest):
        assert {place.root, *place.others} == set(whole.roots)
        assert place.root not in place.others


def test_directory_identity_uses_birth_time_or_device() -> None:
    """A remount changes a device's number, an inode's is used again, overlayfs makes one anew."""
    one = values.DirectoryIdentity(device=1, inode=2, born_ns=3, keeps_birth=True)
    assert one.is_same(one)
    assert one.is_same(dataclasses.replace(one, device=9))
    assert not one.is_same(dataclasses.replace(one, inode=9))
    assert not one.is_same(dataclasses.replace(one, born_ns=9))
    made_anew = dataclasses.replace(one, born_ns=9, keeps_birth=False)
    assert one.is_same(made_anew)
    assert made_anew.is_same(one)
    assert not one.is_same(dataclasses.replace(made_anew, device=9))
    unknown = dataclasses.replace(one, born_ns=0)
    assert one.is_same(unknown)
    assert unknown.is_same(one)
    assert not unknown.is_same(dataclasses.replace(unknown, device=9))


def test_path_with_a_root_as_text_prefix_is_not_in_the_root() -> None:
    """/ab is not below /a."""
    assert decision(policy_of(rule()), PEER, request(source="/ab/x")) is None


@pytest.mark.parametrize("path", ["/a", "/d"])
def test_path_of_a_root_itself_is_refused(path: str) -> None:
    """And the answer doesn't tell that it is a root."""
    with pytest.raises(conditions.PermissionDenied):
        decide.decide(policy_of(rule()), PEER, request(source=path, dest="/d/x"))
    with pytest.raises(conditions.PermissionDenied):
        decide.decide(policy_of(rule()), PEER, request(source="/a/x", dest=path))


def test_unstated_source_format_uses_the_first_rule_that_allows_the_paths() -> None:
    """Probing later is held against that rule, and no second one is tried."""
    first = rule(name="grants[0]", read_formats=frozenset({"raw"}))
    second = rule(name="grants[1]", read_formats=frozenset({"vmdk"}))
    probed = decide.decide(policy_of(first, second), PEER, request(source_format=""))
    stated = decide.decide(policy_of(first, second), PEER, request(source_format="vmdk"))
    assert (probed.rule, probed.read_formats) == ("grants[0]", frozenset({"raw"}))
    assert (stated.rule, stated.read_formats) == ("grants[1]", frozenset({"vmdk"}))


def test_default_compression_comes_from_the_policy() -> None:
    """Whoever holds a grant need not ask what "default" means."""
    asked = request()
    dest = dataclasses.replace(asked.dest, compression=values.Compression.DEFAULT)
    grant = decide.decide(policy_of(rule()), PEER, dataclasses.replace(asked, dest=dest))
    assert grant.request.dest.compression is values.Compression.ZLIB


DEVICES = values.Root(
    name="v",
    path="/dev/v",
    kind=values.RootKind.BLOCK,
    access=values.RootAccess.DAEMON,
    allow_is_zero=True,
)
CAREFUL = dataclasses.replace(DEVICES, name="w", path="/dev/w", allow_is_zero=False)


def decided_to(path: str, **changes: object) -> str:
    """The reason for which a destination is refused to whoever may write everywhere."""
    wide = dataclasses.replace(
        policy_of(rule(write=(ROOTS["/d"], DEVICES, CAREFUL))),
        roots=(*ROOTS.values(), DEVICES, CAREFUL),
    )
    dest = dataclasses.replace(request(dest=path, dest_format="raw").dest, **changes)  # type: ignore[arg-type]
    asked = dataclasses.replace(request(), dest=dest)
    return refusals.reason_of(lambda: decide.decide(wide, PEER, asked))


def test_zero_claim_for_a_device_needs_permission_of_its_root() -> None:
    """And nowhere else: a wrong claim would show a former tenant's blocks."""
    assert decided_to("/dev/v/lv", is_zero=True) == "done"
    assert decided_to("/dev/w/lv", is_zero=True) == "CLAIM_NOT_ALLOWED"
    assert decided_to("/dev/w/lv") == "done"


def test_zero_claim_for_a_file_is_refused() -> None:
    """A file is made anew."""
    assert decided_to("/d/x", is_zero=True) == "BAD_OPTION"


def test_mode_for_a_device_is_refused() -> None:
    """It is the system's."""
    assert decided_to("/dev/v/lv", mode=0o600) == "BAD_OPTION"
    assert decided_to("/d/x", mode=0o600) == "done"


def test_zero_claim_without_write_permission_gets_the_general_refusal() -> None:
    """The rule comes first."""
    asked = dataclasses.replace(
        request(), dest=values.Destination(path="/e/x", format="raw", is_zero=True)
    )
    refused = refusals.reason_of(lambda: decide.decide(policy_of(rule()), PEER, asked))
    assert refused == "PERMISSION_DENIED"


def test_refusal_contains_only_values_of_the_request() -> None:
    """No root, no rule, nothing about what exists."""
    with pytest.raises(conditions.PermissionDenied) as refusal:
        decide.decide(policy_of(), PEER, request(source="/a/x\ny", source_format=""))
    assert refusal.value.values() == {
        "uid": 1,
        "action": "convert '/a/x\\ny' to '/d/x' (qcow2)",
    }
    with pytest.raises(conditions.PermissionDenied, match=r"uid 1 to inspect '/a/x' \(raw\)"):
        decide.decide_inspect(
            policy_of(),
            PEER,
            values.InspectRequest(source=values.Source(path="/a/x", format="raw")),
        )


def test_refusal_with_the_longest_paths_fits_into_a_reply() -> None:
    """A reply's metadata ends at 8 KiB."""
    path = "/a" + "/very-long" * 400
    with pytest.raises(conditions.PermissionDenied) as refusal:
        decide.decide(policy_of(), PEER, request(source=path, dest=f"{path}er"))
    assert len(str(refusal.value)) < 1024


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        pytest.param(values.Peer(uid=7, gid=1, groups=frozenset(), pid=1), True, id="by-uid"),
        pytest.param(values.Peer(uid=8, gid=1, groups=frozenset({70}), pid=1), True, id="by-group"),
        pytest.param(PEER, False, id="not-somebody-else"),
    ],
)
def test_operator_is_recognized(peer: values.Peer, expected: bool) -> None:  # noqa: FBT001
    """Operators see and cancel every job."""
    assert decide.is_operator(policy_of(rule()), peer) is expected


def test_operator_without_a_rule_can_not_convert() -> None:
    """Only rules give that."""
    operator = values.Peer(uid=7, gid=7, groups=frozenset(), pid=1)
    assert decision(policy_of(rule()), operator, request()) is None


def test_access_lists_only_the_rules_of_the_caller() -> None:
    """What GetAccess tells."""
    own = rule(read=(ROOTS["/a"],), write=(ROOTS["/d"], ROOTS["/a"]))
    others = rule(name="grants[1]", subjects=decide.Subjects(uids=frozenset({2})))
    assert decide.grants_of(policy_of(own, others), PEER) == (
        results.Grant(
            rule="grants[0]",
            roots=(
                granted("/a", may_read=True, may_write=True),
                granted("/d", may_read=False, may_write=True),
            ),
            read_formats=("qcow2", "raw"),
            write_formats=("qcow2", "raw"),
            overwrite=values.OverwriteScope.OWN,
        ),
    )


def granted(path: str, *, may_read: bool, may_write: bool) -> results.GrantedRoot:
    """A root of ours as GetAccess shows it."""
    return results.GrantedRoot(
        name=ROOTS[path].name,
        path=path,
        kind=values.RootKind.FILE,
        access=values.RootAccess.DAEMON,
        may_read=may_read,
        may_write=may_write,
        allow_is_zero=False,
    )
