"""Build hook: make `convertd.v1` from the contract while the wheel is built.

The generated package is typed and is never in git (docs/decisions/0001-generated-code.md).
"""

from __future__ import annotations

import importlib.resources
import shutil
import sys
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = "convertd/v1/convert.proto"
PACKAGES = {
    "convertd": "The contract of convertd, one package for each version.",
    "convertd.v1": "Version 1 of the contract, generated from convertd/v1/convert.proto.",
}


class ContractBuildHook(BuildHookInterface):
    """Runs protoc, and puts what it made into the wheel as package `convertd`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the package.

        Raises:
            RuntimeError: an editable install was asked for, or protoc refused the contract.
        """
        if version == "editable":
            msg = "no editable installs: see docs/decisions/0003-non-editable-venv.md"
            raise RuntimeError(msg)
        out = Path(self.root, "build", "generated")
        for name, docstring in PACKAGES.items():
            package = out.joinpath(*name.split("."))
            package.mkdir(parents=True, exist_ok=True)
            package.joinpath("__init__.py").write_text(f'"""{docstring}"""\n')
        out.joinpath("convertd", "py.typed").touch()
        generate(Path(self.root, "proto"), out)
        build_data["force_include"][str(out / "convertd")] = "convertd"


def generate(proto: Path, out: Path) -> None:
    """Run protoc and its plugins on the contract.

    Raises:
        RuntimeError: protoc refused it.
    """
    status = protoc.main(
        [
            "protoc",
            f"--plugin={plugin('protoc-gen-mypy')}",
            f"--plugin={plugin('protoc-gen-mypy_grpc')}",
            f"--proto_path={proto}",
            f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            PROTO,
        ]
    )
    if status != 0:
        msg = f"protoc refused {PROTO}: status {status}"
        raise RuntimeError(msg)


def plugin(name: str) -> str:
    """Find a plugin of protoc: beside the interpreter, or on PATH in an isolated build.

    In this order, so that what is pinned is used, whatever else is on PATH.
    """
    beside = str(Path(sys.executable).with_name(name))
    return shutil.which(beside) or shutil.which(name) or beside
