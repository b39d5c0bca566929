"""docs/policy.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from convertd_daemon import model, policy_bind, policy_toml
from convertd_daemon import policy_values as values

TEXT = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
ROWS = {
    row[0].strip("` "): [cell.strip() for cell in row[1:]]
    for row in (line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| `"))
}


@pytest.mark.parametrize("name", policy_toml.BOUNDS)
def test_the_page_gives_default_and_bounds_of_the_limit(name: str) -> None:
    """As they are in the code."""
    _, default, bounds = ROWS[name]
    least, most = policy_toml.BOUNDS[name]
    limits = policy_toml.parse(f"[limits]\n{name} = {default.strip('`')}").limits
    assert limits == policy_toml.LimitsTable()
    assert bounds == f"{least} – {most}"  # noqa: RUF001 - from … to


@pytest.mark.parametrize(
    "table",
    [
        policy_toml.LimitsTable,
        policy_toml.OperatorsTable,
        policy_toml.RootTable,
        policy_toml.GrantTable,
        policy_toml.ServiceTable,
    ],
)
def test_the_page_has_every_key_of(table: type[policy_toml.LimitsTable]) -> None:
    """And so an operator need not read the code."""
    assert set(table.__struct_fields__) <= ROWS.keys()


@pytest.mark.parametrize(
    "name",
    [
        *sorted(policy_toml.SYSTEM_TREES),
        *sorted(policy_toml.TOO_WIDE),
        *sorted(model.FORMATS),
        *values.SIZE_UNITS,
        *values.TIME_UNITS,
    ],
)
def test_the_page_names(name: str) -> None:
    """Each directory that can't be a root, each format, each unit."""
    assert f"`{name}`" in TEXT


def test_the_example_is_a_policy_that_does_what_the_page_says() -> None:
    """For whoever copies it."""
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    ids = policy_bind.Ids(users={"root": 0, "nova": 107}, groups={"images": 50})
    nova, members = policy_bind.bind(policy_toml.parse(example), ids).rules
    assert nova.read == nova.write
    assert nova.read[0].access is model.Access.DAEMON
    assert members.read[0].access is model.Access.CALLER
