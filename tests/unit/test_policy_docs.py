"""docs/policy.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from convertd_core import values
from convertd_daemon.policy import bind, document, value_types

TEXT = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
ROWS = {
    row[0].strip("` "): [cell.strip() for cell in row[1:]]
    for row in (line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| `"))
}


@pytest.mark.parametrize("name", document.BOUNDS)
def test_policy_page_has_default_and_bounds_of_the_limit(name: str) -> None:
    """As they are in the code."""
    _, default, bounds = ROWS[name]
    least, most = document.BOUNDS[name]
    limits = document.parse(f"[limits]\n{name} = {default.strip('`')}").limits
    assert limits == document.LimitsTable()
    assert bounds == f"{least} – {most}"  # noqa: RUF001 - from … to


@pytest.mark.parametrize(
    "table",
    [
        document.LimitsTable,
        document.OperatorsTable,
        document.RootTable,
        document.GrantTable,
        document.ServiceTable,
    ],
)
def test_policy_page_has_each_key_of(table: type[document.LimitsTable]) -> None:
    """And so an operator need not read the code."""
    assert set(table.__struct_fields__) <= ROWS.keys()


@pytest.mark.parametrize(
    "name",
    [
        *sorted(document.SYSTEM_TREES),
        *sorted(document.TOO_WIDE),
        *sorted(values.FORMATS),
        *value_types.SIZE_UNITS,
        *value_types.TIME_UNITS,
    ],
)
def test_policy_page_names_each(name: str) -> None:
    """Each directory that can't be a root, each format, each unit."""
    assert f"`{name}`" in TEXT


def test_policy_page_example_is_valid_and_does_what_the_page_says() -> None:
    """For whoever copies it."""
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    ids = bind.Ids(users={"root": 0, "nova": 107}, groups={"images": 50})
    nova, members = bind.bind(document.parse(example), ids).rules
    assert nova.read == nova.write
    assert nova.read[0].access is values.RootAccess.DAEMON
    assert members.read[0].access is values.RootAccess.CALLER
