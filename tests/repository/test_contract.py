"""The contract is what its descriptor image says; `make check` compares with that by buf."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import descriptor_pb2

from convertd.v1 import convert_pb2

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "proto/convertd-v1.binpb"
PROTO = "convertd/v1/convert.proto"
BUF = Path(sys.executable).with_name("buf")


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


def test_code_generator_version_is_the_lowest_supported_grpcio() -> None:
    """Generated code refuses a grpcio older than its generator."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (generator,) = (
        requirement.removeprefix("grpcio-tools==")
        for requirement in project["build-system"]["requires"]
        if requirement.startswith("grpcio-tools")
    )
    assert f"grpcio>={generator}" in project["project"]["dependencies"]
