"""Names become ids; what has none grants nothing."""

from __future__ import annotations

import pytest

from convertd_core import conditions, values
from convertd_daemon.policy import bind, decide, document

DOCUMENT = document.parse("""
[operators]
users = ["root"]
groups = ["wheel"]

[roots.images]
path = "/srv/images"
access = "daemon"

[roots.owned]
path = "/srv/images/owned"
access = "daemon"
owner = "nova:kvm"

[[grants]]
users = ["nova", 1234]
groups = ["kvm", 36]
read = ["images", "owned"]
write = ["images", "owned"]
""")
ALL = bind.Ids(users={"root": 0, "nova": 107}, groups={"wheel": 10, "kvm": 108})
NONE = bind.Ids(users={}, groups={})


def test_name_lookup_is_not_done_for_numbers() -> None:
    """Numbers are ids already."""
    assert bind.names_in(DOCUMENT) == bind.NeededNames(
        users=frozenset({"root", "nova"}), groups=frozenset({"wheel", "kvm"})
    )


def test_names_and_numbers_become_ids() -> None:
    """In every place where a user or group can stand."""
    bound = bind.bind(DOCUMENT, ALL)
    assert bind.missing_names(DOCUMENT, ALL) == ()
    assert bound.operators == decide.Subjects(uids=frozenset({0}), gids=frozenset({10}))
    assert bound.rules[0].subjects == decide.Subjects(
        uids=frozenset({107, 1234}), gids=frozenset({108, 36})
    )
    assert bound.roots[1].owner == values.Owner(uid=107, gid=108)


def test_each_unknown_name_is_reported_with_its_key() -> None:
    """For `convertd check`, and for the daemon's warning."""
    assert [str(missing) for missing in bind.missing_names(DOCUMENT, NONE)] == [
        "operators.users[0]: there is no user root",
        "operators.groups[0]: there is no group wheel",
        "grants[0].users[0]: there is no user nova",
        "grants[0].groups[0]: there is no group kvm",
        "roots.owned.owner: there is no user nova",
        "roots.owned.owner: there is no group kvm",
    ]


def test_unknown_user_in_a_rule_is_granted_nothing() -> None:
    """And the others of the rule keep what they have."""
    bound = bind.bind(DOCUMENT, NONE)
    assert bound.operators == decide.Subjects()
    assert bound.rules[0].subjects == decide.Subjects(uids=frozenset({1234}), gids=frozenset({36}))


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(bind.Ids(users={}, groups={"kvm": 108}), id="user"),
        pytest.param(bind.Ids(users={"nova": 107}, groups={}), id="group"),
    ],
)
def test_root_is_closed_when_there_is_no_such_owning(ids: bind.Ids) -> None:
    """And does not fall to the root around it."""
    bound = bind.bind(DOCUMENT, ids)
    peer = values.Peer(uid=1234, gid=1, groups=frozenset(), pid=1)
    inside = values.Source(path="/srv/images/owned/a", format="raw")
    with pytest.raises(conditions.PermissionDenied):
        decide.decide_inspect(bound, peer, values.InspectRequest(source=inside))
    outside = values.Source(path="/srv/images/a", format="raw")
    assert decide.decide_inspect(bound, peer, values.InspectRequest(source=outside)).closed == (
        bound.roots[1],
    )


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        pytest.param(bind.Ids(users={"nova": 65534}, groups={}), "grants[0].users[0]", id="uid"),
        pytest.param(bind.Ids(users={}, groups={"wheel": 65534}), "operators.groups[0]", id="gid"),
    ],
)
def test_name_of_the_overflow_id_is_refused_by(ids: bind.Ids, key: str) -> None:
    """As it is when written as a number: every unmapped id reads as that."""
    with pytest.raises(document.PolicyError, match="65534") as mistake:
        bind.bind(DOCUMENT, ids)
    assert mistake.value.key == key
