"""Command lines that convert an image. To add one, write a function and name it in COMMANDS.

A function gives the commands to be run one after the other, or None if it has no part in a case:
there are no empty rounds. Its docstring goes into the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks.cases import Case

Commands = list[list[str]]
Contestant = Callable[[Case, Path], Commands | None]


def nova_argv(case: Case, dest: Path) -> Commands | None:
    """qemu-img with the arguments that Nova 34 gives it. Source: nova/privsep/qemu.py.

    Nova knows no zstd: there its `-c` runs, which is zlib.
    """
    argv = ["qemu-img", "convert", "-t", "none", "-O", case.dest_format]
    argv += _stated(case)
    argv += ["-c"] if case.compression else []
    return [[*argv, str(case.source.path), str(dest)]]


def vdsm(case: Case, dest: Path) -> Commands | None:
    """qemu-img with the arguments that oVirt's vdsm gives it.

    Compressing, it differs from Nova in nothing that counts, and sits out.
    Source: vdsm, lib/vdsm/storage/qemuimg.py, convert().
    """
    if case.compression:
        return None
    argv = ["qemu-img", "convert", "-p", "-t", "none", "-T", "none", *_stated(case)]
    argv += ["-O", case.dest_format]
    argv += ["-o", "compat=1.1"] if case.dest_format == "qcow2" else []
    return [[*argv, str(case.source.path), str(dest)]]


def cdi(case: Case, dest: Path) -> Commands | None:
    """qemu-img with the arguments that KubeVirt's CDI gives it, which converts to raw alone.

    Source: containerized-data-importer, pkg/image/qemu.go, convertToRaw() and getCacheMode().
    """
    if case.dest_format != "raw":
        return None
    argv = ["qemu-img", "convert", "-t", "writeback", "-p", "-O", "raw"]
    return [[*argv, str(case.source.path), str(dest)]]


def cp(case: Case, dest: Path) -> Commands | None:
    """`cp --reflink=auto --sparse=always`, then `sync`: a copy, so the format must be the same."""
    if case.dest_format != case.source.format or case.compression:
        return None
    copy = ["cp", "--reflink=auto", "--sparse=always", str(case.source.path), str(dest)]
    return [copy, ["sync", str(dest)]]


def nbdcopy(case: Case, dest: Path) -> Commands | None:
    """nbdcopy, of libnbd, between two qemu-nbd, past the page cache, flushed at the end."""
    if case.compression or case.undeclared:
        return None
    serve = ["qemu-nbd", "--cache=none", "--aio=native", "--discard=unmap"]
    create = ["qemu-img", "create", "-q", "-f", case.dest_format, str(dest)]
    return [
        [*create, str(case.source.virtual_bytes)],
        [
            *("nbdcopy", "--flush", "--destination-is-zero", "--"),
            *("[", *serve, "--read-only", "-f", case.source.format, str(case.source.path), "]"),
            *("[", *serve, "-f", case.dest_format, str(dest), "]"),
        ],
    ]


COMMANDS: Final[Mapping[str, Contestant]] = {
    "nova argv": nova_argv,
    "vdsm argv": vdsm,
    "cdi argv": cdi,
    "cp": cp,
    "nbdcopy": nbdcopy,
}


def _stated(case: Case) -> list[str]:
    return [] if case.undeclared else ["-f", case.source.format]
