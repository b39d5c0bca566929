"""Who may import whom, by the contracts in pyproject.toml and by what really gets loaded."""

from __future__ import annotations

import graphlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("convertd", "convertd_client", "convertd_daemon")
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

TRESPASSES = (
    ("convertd_daemon/broker/__init__.py", "import grpc"),
    ("convertd_daemon/broker/__init__.py", "import google.protobuf"),
    ("convertd_daemon/broker/__init__.py", "import convertd_daemon.front"),
    ("convertd_daemon/front/__init__.py", "import convertd_daemon.job"),
    ("convertd_daemon/job/__init__.py", "import convertd.v1"),
    ("convertd_daemon/job/__init__.py", "import msgspec"),
    ("convertd_daemon/job/qemu/plan.py", "import subprocess"),
    ("convertd_daemon/linux/__init__.py", "import convertd_daemon.sandbox"),
    ("convertd_daemon/policy/decide.py", "import os"),
    ("convertd_client/__init__.py", "import convertd_daemon.front"),
)
"""To which module a forbidden import is added, and which."""


def lint(packages: Path) -> subprocess.CompletedProcess[str]:
    """Judge the packages in a directory, as `make check` does the installed ones."""
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    return subprocess.run(
        [LINT_IMPORTS, "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=packages,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed packages, to be changed."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, tmp_path / name)
    return tmp_path


def test_each_forbidden_import_is_detected(copy: Path) -> None:
    """The contracts in pyproject.toml really forbid what they seem to."""
    for module, statement in TRESPASSES:
        with (copy / module).open("a") as file:
            file.write(f"\n{statement}\n")
    outcome = lint(copy)
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    for module, statement in TRESPASSES:
        importer = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        imported = statement.removeprefix("import ")
        if not imported.startswith(PACKAGES):  # another's package is named as a whole
            imported = imported.partition(".")[0]
        assert f"{importer} -> {imported}" in outcome.stdout, outcome.stdout


def test_job_sandbox_and_kernel_import_only_the_standard_library_and_own_code() -> None:
    """A job runs with the caller's own rights and nothing installed (`convertd_client.local`)."""
    graph = grimp.build_graph("convertd_daemon", include_external_packages=True, cache_dir=None)
    parts = ("convertd_daemon.job", "convertd_daemon.sandbox", "convertd_daemon.linux")
    imported = {
        target.partition(".")[0]
        for module in graph.modules
        if module.startswith(parts)
        for target in graph.find_modules_directly_imported_by(module)
    }
    assert imported - sys.stdlib_module_names == {"convertd_core", "convertd_daemon"}


def test_there_is_no_import_cycle() -> None:
    """Not for types alone either: whoever reads one must not have to read the other."""
    graph = grimp.build_graph("convertd_core", *PACKAGES, cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    graphlib.TopologicalSorter(imported).prepare()


@pytest.mark.parametrize("module", ["convertd_daemon.job.main", "convertd_daemon.serve"])
def test_root_processes_do_not_load_grpc(module: str) -> None:
    """Whatever an import brings along counts too, so this asks the interpreter."""
    loaded = {name.partition(".")[0] for name in loaded_by(module)}
    assert not loaded & {"convertd", "google", "grpc"}


def test_front_does_not_load_hashlib() -> None:
    """What hashes loads OpenSSL, and with it 5 MiB."""
    assert not {"hashlib", "hmac", "secrets"} & loaded_by("convertd_daemon.front.main")


def test_front_is_started_before_the_broker_loads_most_modules() -> None:
    """It takes longest to start: what the command loads for its first steps delays the daemon."""
    heavy = {"convertd_daemon.channel", "convertd_core.values", "msgspec"}
    assert not heavy & loaded_by("convertd_daemon.main")
    assert heavy <= loaded_by("convertd_daemon.serve")


def loaded_by(module: str) -> set[str]:
    """All modules that one module's import loads, beside those that any program has."""
    script = (
        "import json, sys; before = set(sys.modules);"
        f"import {module}; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    outcome = subprocess.run(
        [sys.executable, "-I", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(outcome.stdout))
