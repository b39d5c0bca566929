"""What docs/threat-model.md names exists. Its links are checked with those of the other pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")

SECTION = PAGE.partition("## A taken-over front")[2].partition("\n## ")[0]

OF_THE_FRONT = re.findall(r"(?<!\[)`(test_\w+)`", SECTION)


@pytest.mark.parametrize("name", sorted(set(OF_THE_FRONT)))
def test_each_threat_model_row_about_the_front_names_an_existing_test(name: str) -> None:
    """In the file that the table's head names."""
    path = ROOT / "tests" / "hostile" / "test_compromised_front.py"
    assert f"def {name}(" in path.read_text(encoding="utf-8")


def test_threat_model_pattern_finds_many_rows() -> None:
    """Or the pattern above would no longer find them."""
    assert len(set(OF_THE_FRONT)) >= 14


@pytest.mark.parametrize("name", sorted(set(re.findall(r"CVE-\d{4}-\d+", PAGE))))
def test_each_cve_in_the_threat_model_is_in_a_test(name: str) -> None:
    """By its number."""
    files = (ROOT / "tests" / "hostile").glob("*.py")
    assert any(name in path.read_text(encoding="utf-8") for path in files)
