"""What convertctl reads and writes: sizes, times, modes, and texts that others chose."""

from __future__ import annotations

import os

import pytest

from convertd_client.cli import text, values


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("1048576", 1048576),
        ("0", 0),
        ("50M", 50 << 20),
        ("50m", 50 << 20),
        ("50MiB", 50 << 20),
        ("50 MiB/s", 50 << 20),
        ("50MB", 50_000_000),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("8b", 8),
    ],
)
def test_size_argument_is_parsed_as_qemu_img_does(typed: str, size: int) -> None:
    """With powers of 1024, unless it says otherwise."""
    assert values.parse_size(typed) == size


@pytest.mark.parametrize("typed", ["", "M", "-1", "1X", "1iB", "1e6", "1M2", "٣"])
def test_invalid_size_argument_is_refused(typed: str) -> None:
    """Rather than guessed at."""
    with pytest.raises(ValueError, match="is not a size"):
        values.parse_size(typed)


@pytest.mark.parametrize(
    ("typed", "seconds"), [("90", 90), ("1.5s", 1.5), ("10m", 600), ("10 min", 600), ("1d", 86400)]
)
def test_time_argument_is_parsed_with_its_unit(typed: str, seconds: float) -> None:
    """Seconds if there is none."""
    assert values.parse_time(typed) == seconds


@pytest.mark.parametrize("typed", ["", "0", "0s", "-1", "1w", "m"])
def test_invalid_time_argument_is_refused(typed: str) -> None:
    """Nor is no time at all one."""
    with pytest.raises(ValueError, match="is not a time"):
        values.parse_time(typed)


@pytest.mark.parametrize(("typed", "mode"), [("640", 0o640), ("0640", 0o640), ("000", 0)])
def test_mode_argument_is_parsed_as_octal(typed: str, mode: int) -> None:
    """As chmod does."""
    assert values.parse_mode(typed) == mode


@pytest.mark.parametrize("typed", ["", "9", "0o640", "888", "1777", "rw"])
def test_invalid_mode_argument_is_refused(typed: str) -> None:
    """Nor are bits beyond the permissions."""
    with pytest.raises(ValueError, match="is not a mode"):
        values.parse_mode(typed)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain äöü 日本", "plain äöü 日本"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202eexe.txt", "\\u202eexe.txt"),
        ("\U000e0001", "\\U000e0001"),
        (os.fsdecode(b"\xff"), "\\xff"),
        ("\ud800", "\\ud800"),
    ],
    ids=ascii,
)
def test_terminal_control_characters_are_escaped(name: str, shown: str) -> None:
    """Whoever chose it."""
    assert text.shown(name) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1024, "1.00 KiB"),
        (64 << 20, "64.0 MiB"),
        (1000 << 20, "0.98 GiB"),
        (1 << 62, "4096 PiB"),
    ],
)
def test_size_is_displayed_with_three_digits(count: int, shown: str) -> None:
    """And the unit that makes them do."""
    assert text.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.00 s"),
        (9.876, "9.88 s"),
        (59.4, "59.4 s"),
        (59.9, "1 min 00 s"),
        (7262, "2 h 01 min"),
    ],
)
def test_duration_is_displayed_in_its_two_largest_units(seconds: float, shown: str) -> None:
    """In the largest two units."""
    assert text.duration(seconds) == shown
