"""Whatever bytes an image has, the bytes of a secret file never reach a result; nothing breaks.

Corrupted images of each format go through Inspect and Convert on a real daemon. How many is told by
CONVERTD_FUZZ_IMAGES, how long at most by CONVERTD_FUZZ_SECONDS; CONVERTD_FUZZ_SEED tells which. An
image is made again from seed and number: `mutation.corrupted(seeds, seed, number)`.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from harness import processes, waiting
from harness.agent import Call, conversion
from harness.callers import ALICE, BOB
from harness.daemon import FRONT, Daemon
from hostile import mutation, simple_calls
from hostile import secret as secrets
from hostile.mutation import Corrupted, Seed
from hostile.secret import Secret
from policies import IMAGES, Grant, Policy

from convertd.v1 import convert_pb2 as pb

POLICY: Final = Policy(
    limits={
        "jobs": 8,
        "jobs_per_user": 8,
        "inspections": 8,
        "inspections_per_user": 8,
        "virtual_size": "64 MiB",
        "duration": "10 s",
    },
    grants=[
        Grant(
            read=[IMAGES],
            write=[IMAGES],
            formats=["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "luks"],
        )
    ],
)

COUNT: Final = int(os.environ.get("CONVERTD_FUZZ_IMAGES", "200"))
SECONDS: Final = float(os.environ.get("CONVERTD_FUZZ_SECONDS", "90"))
SEED: Final = int(os.environ.get("CONVERTD_FUZZ_SEED", "1"))
REPORT: Final = os.environ.get("CONVERTD_FUZZ_REPORT", "")

AT_ONCE: Final = 8

GROWTH_KIB: Final = 16 * 1024
"""What a process of the daemon's may grow by, however many images there were."""

FORMATS: Final = ("qcow2", "vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "raw")


@pytest.fixture(scope="module")
def secret(scratch: Path) -> Secret:
    """A file that must never be read."""
    return secrets.made(scratch / "secret")


@pytest.fixture(scope="module")
def seeds(scratch: Path, secret: Secret) -> tuple[Seed, ...]:
    """The images to begin with."""
    directory = scratch / "seeds"
    directory.mkdir()
    return mutation.seeds(directory, secret)


@dataclass(slots=True)
class Figures:
    """What came of it."""

    images: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def count(self, image: Corrupted, what: str, answer: simple_calls.Outcome) -> None:
        """Take in how one call ended."""
        self.ends[f"{what} {answer.reason or answer.status}"] += 1
        if "qemu-img crashed" in answer.message or "ended by SIG" in answer.message:
            self.crashes.append(f"{SEED}:{image.number} {image.seed.name}, {what}")


class Run:
    """Some images on their way through the daemon at the same time."""

    def __init__(self, daemon: Daemon, directory: Path, marker: bytes) -> None:
        """Use a directory of Alice's."""
        self.daemon = daemon
        self.directory = directory
        self.marker = marker
        self.figures = Figures()

    def through(self, images: list[Corrupted]) -> None:
        """Inspect and convert them all, and look for the secret in whatever comes back."""
        began = time.monotonic()
        asked = [(image, *self.begin(place, image)) for place, image in enumerate(images)]
        for image, out, inspecting, converting in asked:
            for what, call in (("inspect", inspecting), ("convert", converting)):
                answer = simple_calls.outcome_of(call)
                assert self.marker not in answer.received, f"{SEED}:{image.number} {what}"
                self.figures.count(image, what, answer)
            assert not simple_calls.contains(out, self.marker), f"{SEED}:{image.number}"
            out.unlink(missing_ok=True)
            self.figures.images += 1
        self.figures.slowest_s = max(self.figures.slowest_s, time.monotonic() - began)

    def begin(self, place: int, image: Corrupted) -> tuple[Path, Call, Call]:
        """Ask for both. The format of a corrupted image is stated, unstated or stated wrong."""
        pick = random.Random(f"{SEED}:{image.number}:asked")  # noqa: S311 - to be repeated
        stated = pick.choice((image.seed.format, image.seed.format, "", pick.choice(FORMATS)))
        if image.data == image.seed.data:
            stated = image.seed.format
        path = simple_calls.file_of(ALICE, self.directory / f"{place}.img", image.data)
        out = self.directory / f"{place}.out"
        agent = self.daemon.agent(ALICE)
        look = pb.InspectRequest(source=pb.Source(path=str(path), format=stated))
        request = conversion(path, out, source_format=stated, dest_format="raw")
        if image.seed.encrypted:
            request.source.format = image.seed.format
            request.source.encryption.passphrase = mutation.PASSPHRASE
        return out, agent.call("Inspect", look), agent.convert(request)


@pytest.fixture
def run(daemon: Daemon, images_dir: Path, secret: Secret) -> Iterator[Run]:
    """A run. After it nothing is left, nothing has grown, and others are served."""
    os.chown(images_dir, ALICE.uid, ALICE.gid)
    one = Run(daemon, images_dir, secret.marker)
    yield one
    assert secret.unchanged()
    assert not [path for path in images_dir.iterdir() if path.suffix != ".img"]
    assert daemon.agent(BOB).access().uid == BOB.uid


@pytest.mark.timeout(SECONDS + 300)
def test_corrupted_image_reveals_no_secret_and_does_not_end_the_daemon(
    daemon: Daemon, seeds: tuple[Seed, ...], run: Run
) -> None:
    """Each is answered in time, by a result or by a condition that has a name."""
    front, end = daemon.await_one(FRONT), time.monotonic() + SECONDS
    # First those that are as they were: they must be read, or the fuzz would show nothing.
    honest = [seed for seed in seeds if not seed.names_a_secret]
    # One by one: beside the others one might not be done in the time that each has.
    for seed in honest:
        run.through([Corrupted(seed=seed, number=-1, data=seed.data)])
    assert run.figures.ends["convert OK"] == len(honest)
    run.through([mutation.corrupted(seeds, SEED, number) for number in range(AT_ONCE)])
    pids = {"broker": daemon.pid, "front": front}
    before = {name: processes.anonymous_kib(pid) for name, pid in pids.items()}
    daemon.await_idle()
    open_before = {name: len(processes.descriptors(pid)) for name, pid in pids.items()}
    number = AT_ONCE
    while number < COUNT and time.monotonic() < end:
        last = min(number + AT_ONCE, COUNT)
        run.through([mutation.corrupted(seeds, SEED, n) for n in range(number, last)])
        number = last
    daemon.await_idle()
    assert daemon.await_one(FRONT) == front
    after = {name: processes.anonymous_kib(pid) for name, pid in pids.items()}
    _report(run.figures, before, after)
    for name, pid in pids.items():
        most = open_before[name] + processes.LAZY_DESCRIPTORS
        waiting.until(
            lambda pid=pid, most=most: len(processes.descriptors(pid)) <= most,  # type: ignore[misc]
            f"the {name} has no more open than before",
        )
    assert all(after[name] < before[name] + GROWTH_KIB for name in pids), (before, after)


def _report(figures: Figures, before: dict[str, int], after: dict[str, int]) -> None:
    if REPORT:
        told = {
            "images": figures.images,
            "seed": SEED,
            "ends": dict(figures.ends.most_common()),
            "crashes of qemu-img, contained": figures.crashes,
            "slowest batch, seconds": round(figures.slowest_s, 1),
            "private KiB before": before,
            "private KiB after": after,
        }
        Path(REPORT).write_text(json.dumps(told, indent=1), encoding="utf-8")
