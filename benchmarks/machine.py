"""Describe the machine that is measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess

from benchmarks import callers, results


def describe() -> results.Machine:
    """Describe this machine."""
    return results.Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        cpu=_field("/proc/cpuinfo", "model name"),
        cores=os.cpu_count() or 0,
        memory_mib=int(_field("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        kernel=platform.release(),
        system=platform.freedesktop_os_release()["PRETTY_NAME"],
        load=os.getloadavg()[0],
        versions={
            "convertd": importlib.metadata.version("convertd"),
            "qemu-img": _number(_output("qemu-img", "--version")),
            "Nova": _output(str(callers.NOVA), "-c", _VERSION.format("nova")),
            "oslo.privsep": _output(str(callers.NOVA), "-c", _VERSION.format("oslo.privsep")),
            "nbdcopy": _number(_output("nbdcopy", "--version")),
            "fio": _number(_output("fio", "--version")),
            "Python": platform.python_version(),
            "grpcio": importlib.metadata.version("grpcio"),
        },
    )


_VERSION = "import importlib.metadata as m; print(m.version('{}'))"


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def _number(text: str) -> str:
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else text


def _field(path: str, name: str) -> str:
    with open(path, encoding="utf-8") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(name))
