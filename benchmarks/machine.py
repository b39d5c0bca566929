"""Describe the machine that is measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from benchmarks import measured, peers


def look(directory: Path) -> measured.Machine:
    """Describe this machine, and the file system that a directory is on."""
    return measured.Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        cpu=_field("/proc/cpuinfo", "model name"),
        cores=os.cpu_count() or 0,
        memory_mib=int(_field("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        kernel=platform.release(),
        system=platform.freedesktop_os_release()["PRETTY_NAME"],
        file_system=" ".join(
            _said("findmnt", "-no", "FSTYPE,OPTIONS", "--target", str(directory)).split()
        ),
        load=os.getloadavg()[0],
        versions={
            "convertd": importlib.metadata.version("convertd"),
            "qemu-img": _number(_said("qemu-img", "--version")),
            "Nova": _said(str(peers.NOVA), "-c", _VERSION.format("nova")),
            "oslo.privsep": _said(str(peers.NOVA), "-c", _VERSION.format("oslo.privsep")),
            "nbdcopy": _number(_said("nbdcopy", "--version")),
            "fio": _number(_said("fio", "--version")),
            "Python": platform.python_version(),
            "grpcio": importlib.metadata.version("grpcio"),
        },
    )


_VERSION = "import importlib.metadata as m; print(m.version('{}'))"


def _said(*argv: str) -> str:
    return subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def _number(said: str) -> str:
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else said


def _field(path: str, name: str) -> str:
    with open(path, encoding="utf-8") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(name))
