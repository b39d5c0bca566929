"""The parts of sharing blocks that need no file system: a map's lines, extents, whole blocks."""

from __future__ import annotations

import itertools
import json
import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convertd_daemon.job.qemu import image_map
from convertd_daemon.job.reflink import extent_list, placing
from convertd_daemon.job.reflink.extents import Extent

BLOCK = 4096

FOUND = {"start": 0, "length": 8, "depth": 1, "present": True, "zero": False, "data": True}

numbers = st.integers(min_value=0, max_value=2**40)


def entry(**fields: object) -> dict[str, object]:
    """A line as qemu-img prints it, but for these fields."""
    return FOUND | fields


def read(data: bytes, pieces: list[int]) -> list[image_map.Entry]:
    """Read a list that comes in pieces of these lengths."""
    found: list[image_map.Entry] = []
    reader = image_map.Reader()
    for length in (*pieces, len(data)):
        found += reader.take(data[:length])
        data = data[length:]
    return [*found, *reader.end()]


@given(st.lists(numbers, max_size=30), st.lists(st.integers(1, 200), max_size=20))
def test_map_is_read_however_it_is_cut(offsets: list[int], pieces: list[int]) -> None:
    """Each line once, in order."""
    lines = [entry(start=number, offset=offset) for number, offset in enumerate(offsets)]
    text = "[" + ",\n".join(json.dumps(line) for line in lines) + "]\n"
    found = read(text.encode(), pieces)
    assert [(one.start, one.offset) for one in found] == list(enumerate(offsets))


def test_entry_without_a_place_has_no_offset() -> None:
    """Compressed data is nowhere as it is."""
    (found,) = read(json.dumps([entry()]).encode(), [])
    assert found == image_map.Entry(0, 8, 1, False, True, image_map.NO_OFFSET)


@pytest.mark.parametrize(
    "line",
    [
        entry(start=-1),
        entry(length=1.5),
        entry(offset=2**63),
        entry(offset="0"),
        entry(offset=None),
        entry(depth=True),
        entry(zero=0),
        entry(data="yes"),
        {"start": 0},
        "text",
        1,
        None,
    ],
    ids=[
        *(
            "negative start",
            "fraction",
            "too large",
            "text for a number",
            "null",
            "flag for a number",
        ),
        *("number for a flag", "text for a flag", "incomplete", "text", "number", "nothing"),
    ],
)
def test_line_that_qemu_img_would_not_print_is_not_understood(line: object) -> None:
    """No type is guessed, and no number wraps."""
    with pytest.raises(image_map.NotUnderstoodError):
        read(json.dumps([line]).encode(), [])


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"x" * 5000, b'{"start": ' + b"9" * 4000 + b"}\n", b"\xff\n", b"{},\n] [{}\n"],
    ids=["nested", "endless line", "long number", "no text", "two lists"],
)
def test_output_that_is_no_map_is_not_understood(text: bytes) -> None:
    """And no more than a piece of it is kept."""
    with pytest.raises(image_map.NotUnderstoodError):
        read(text, [])


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 2)), max_size=50))
def test_extents_that_go_on_in_disk_and_file_become_one(
    parts: list[tuple[int, bool, int]],
) -> None:
    """Nothing is lost, and what is given is in order, as often as it is asked for."""
    with tempfile.TemporaryFile() as file:
        extents = extent_list.ExtentList(file.fileno())
        added, at = [], 0
        for length, apart, member in parts:
            at += apart
            extents.add(at, length, member, at + 100 * member)
            added += [(at + byte, member, at + byte + 100 * member) for byte in range(length)]
            at += length
        extents.end()
        for _ in range(2):
            found = list(extents)
            assert [byte for extent in found for byte in bytes_of(extent)] == added
            for one, other in itertools.pairwise(found):
                assert (one.end_bytes, one.member) != (other.start_bytes, other.member)


def bytes_of(extent: Extent) -> list[tuple[int, int, int]]:
    """Each byte of an extent: where in the disk, of which member, and where in its file."""
    assert extent.offset_bytes is not None
    return [
        (extent.start_bytes + byte, extent.member, extent.offset_bytes + byte)
        for byte in range(extent.length_bytes)
    ]


@pytest.mark.parametrize("count", [1, 100_000])
def test_list_of_many_extents_is_not_kept_in_memory(count: int) -> None:
    """It is in the file, in 32 bytes each."""
    with tempfile.TemporaryFile() as file:
        extents = extent_list.ExtentList(file.fileno())
        for number in range(count):
            extents.add(number * 2, 1, 0, number * 2)
        extents.end()
        assert os.fstat(file.fileno()).st_size == count * 32
        assert sum(1 for _ in extents) == count


@given(numbers, numbers, st.integers(0, 2**30))
def test_whole_blocks_of_a_stretch_are_whole_in_both_files(
    source: int, dest: int, length: int
) -> None:
    """And as many as there are; none where the two lie in other places of their blocks."""
    head, whole = placing.whole_blocks(source, dest, length, BLOCK)
    assert head >= 0
    assert whole % BLOCK == 0
    assert head + whole <= length
    if whole:
        assert (source + head) % BLOCK == (dest + head) % BLOCK == 0
        assert head < BLOCK
        assert length - head - whole < BLOCK
    elif (source - dest) % BLOCK == 0:
        assert length < 2 * BLOCK
