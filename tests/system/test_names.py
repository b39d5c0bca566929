"""Names that mean something to a shell, to qemu or to a terminal, and to convertd nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import pytest
from harness import images
from harness.agent import conversion
from harness.callers import ALICE
from harness.daemon import Daemon
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    grants=[Grant(read=[IMAGES], write=[IMAGES], formats=["raw", "qcow2", "vmdk"])]
)

NAMES: Final = {
    "a comma and an equals sign": "a,backing_file=b",
    "two commas": "a,,b",
    "a newline": "a\nb",
    "quotes": "a'b\"c",
    "a backslash": "a\\b",
    "a colon": "nbd:localhost:1",
    "json": 'json:{"driver":"null-co"}',
    "dashes": "--object",
    "blanks": "  a b ",
    "an escape sequence": "a\x1b[2Jb",
    "letters beyond ASCII": "ünï-\u202e-日本",
    "255 bytes": "a" * 255,
    "a glob": "*",
    "a percent sign": "%n%s",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=tuple(NAMES))
@pytest.mark.parametrize("dest_format", ["raw", "qcow2", "vmdk"])
def test_image_is_converted_from_and_to_a_name_with(
    daemon: Daemon, images_dir: Path, name: str, dest_format: str
) -> None:
    """No name is ever an argument of qemu-img's. A vmdk writes its own down, and is read again."""
    there, here = images_dir / "there", images_dir / "here"
    there.mkdir()
    here.mkdir()
    source = images.small(there / name)
    agent = daemon.agent(ALICE)
    result = agent.convert(conversion(source, here / name, dest_format=dest_format)).result()
    assert result.published
    assert os.listdir(here) == [name]
    back = conversion(here / name, here / "back", source_format=dest_format, dest_format="raw")
    agent.convert(back).result()
    assert (here / "back").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", NAMES.values(), ids=tuple(NAMES))
def test_image_is_inspected_under_a_name_with(daemon: Daemon, images_dir: Path, name: str) -> None:
    """And is told under that name."""
    path = images.created(images_dir / "a.qcow2", "qcow2", 4).rename(images_dir / name)
    request = pb.InspectRequest(source=pb.Source(path=str(path)))
    told = daemon.agent(ALICE).ask("Inspect", request, pb.InspectResponse)
    assert (told.path, told.format) == (str(path), "qcow2")
    assert json.loads(told.qemu_img_json)["filename"] == str(path)
