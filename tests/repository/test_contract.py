"""The contract is what its descriptor image says, and can't be broken unnoticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from convertd.v1 import convert_pb2

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "proto/convertd-v1.binpb"
PROTO = "convertd/v1/convert.proto"
BUF = Path(sys.executable).with_name("buf")

BREAKS = {
    "a field removed": ("  bool verify = 4;\n", ""),
    "a field renumbered": ("bool verify = 4;", "bool verify = 40;"),
    "a field renamed": ("bool verify = 4;", "bool check = 4;"),
    "a field retyped": ("bool verify = 4;", "string verify = 4;"),
    "a field that loses its presence": ("optional uint32 mode", "uint32 mode"),
    "an enum value removed": ("  CACHE_MODE_DIRECTSYNC = 5;\n", ""),
    "a call removed": ("  rpc GetStats(GetStatsRequest) returns (GetStatsResponse);\n", ""),
    "a stream made single": ("returns (stream ConvertResponse)", "returns (ConvertResponse)"),
}


def buf(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run buf."""
    return subprocess.run(
        [BUF, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )


def forget_json_names(messages: Iterable[descriptor_pb2.DescriptorProto]) -> None:
    """Drop what follows from the fields' names, and buf alone spells out."""
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        forget_json_names(message.nested_type)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the contract, to be changed."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def test_descriptor_image_in_git_matches_the_contract(tmp_path: Path) -> None:
    """Additions are in it too: from then on they can't be broken either (`make contract`)."""
    built = buf("build", "--exclude-source-info", "-o", tmp_path / "now.binpb", cwd=ROOT)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "now.binpb").read_bytes() == IMAGE.read_bytes()


def test_installed_code_matches_the_contract() -> None:
    """Each message, field, enum and call that Python knows is the image's."""
    files = descriptor_pb2.FileDescriptorSet.FromString(IMAGE.read_bytes()).file
    (stated,) = (file for file in files if file.name == PROTO)
    installed = descriptor_pb2.FileDescriptorProto()
    convert_pb2.DESCRIPTOR.CopyToProto(installed)
    forget_json_names(stated.message_type)
    assert installed.message_type == stated.message_type
    assert installed.enum_type == stated.enum_type
    assert installed.service == stated.service


def test_control_unchanged_contract_passes_the_breaking_check(copy: Path) -> None:
    """The control of the test below."""
    assert buf("breaking", "--against", IMAGE, cwd=copy).returncode == 0


@pytest.mark.parametrize(("old", "new"), BREAKS.values(), ids=BREAKS)
def test_breaking_change_is_detected(copy: Path, old: str, new: str) -> None:
    """As `make check` would notice it."""
    proto = copy / "proto" / PROTO
    text = proto.read_text()
    assert text.count(old) == 1
    proto.write_text(text.replace(old, new))
    outcome = buf("breaking", "--against", IMAGE, cwd=copy)
    assert outcome.returncode != 0
    assert PROTO in outcome.stdout


def test_undocumented_contract_field_is_detected(copy: Path) -> None:
    """A comment on each message, field, value and call is a rule of `buf lint`."""
    proto = copy / "proto" / PROTO
    proto.write_text(proto.read_text() + "\nmessage Bare {\n  bool said = 1;\n}\n")
    outcome = buf("lint", cwd=copy)
    assert outcome.returncode != 0
    assert "should have a non-empty comment" in outcome.stdout


def test_code_generator_version_is_the_lowest_supported_grpcio() -> None:
    """Generated code refuses a grpcio older than its generator."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (generator,) = (
        requirement.removeprefix("grpcio-tools==")
        for requirement in project["build-system"]["requires"]
        if requirement.startswith("grpcio-tools")
    )
    assert f"grpcio>={generator}" in project["project"]["dependencies"]
