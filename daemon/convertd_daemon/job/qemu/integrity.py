"""Check that a file holds all of its image. Fails closed: what can't be determined is refused.

qemu does not check this. Where a table leads beyond the end of the file, it reads zeroes without an
error: half of a qcow2 would become a whole disk. So qemu-img runs a check, in the same sandbox and
during the conversion, and nothing is published before its answer.

    qcow2                       `check`, which follows every table: where one is cut off, all that
                                it led to would read as zeroes. It forgives an end within the last
                                cluster, where compressed images end; for those, `map` runs too.
    vmdk, vdi, qed, parallels   `map`, which tells where all data lies. Their tables come first, and
                                a qed table that is cut off is an error to qemu. Parallels is mapped
                                piece by piece: on 1 TiB and more at once, qemu-img crashes.
    vpc, vhdx, dmg              nothing: qemu does not open one that is cut off.
    raw, luks                   nothing: what is there is the image.

A compressed cluster that is cut off fails to decompress in the conversion itself, as a rule: raw
deflate, the qcow2 kind of zlib, has no checksum, and of the last cluster alone may give garbage.

Reference counts that are wrong, in a way that leaves the data where it is, are accepted where that
is asked and allowed: see damage. In a qcow2 whose dirty flag is set they are always wrong, and are
accepted without that. Then a `map` must show, too, that no data lies beyond the end. A `map` alone
would not do: of a table that is cut off it reports that all it led to reads as zeroes.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from convertd_core import conditions, results, values
from convertd_daemon.job import damage, secrets, stages
from convertd_daemon.job.qemu import conversion, execution, image_info, image_map
from convertd_daemon.job.qemu import plan as plans
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from convertd_daemon.job.endpoints import Endpoints
    from convertd_daemon.job.files.opened_source import Source

log = logging.getLogger(__name__)

CHECKED: Final = frozenset({"qcow2"})
MAPPED: Final = frozenset({"vmdk", "vdi", "qed", "parallels"})

SOUND: Final = frozenset({0, 3})
"""What `check` exits with where nothing is wrong, and where nothing but space is lost."""

CORRUPT: Final = 2

PIECE_BYTES: Final = {"parallels": 512 * 1024**3}
"""How much of a disk is mapped at once. qemu 7.2 asserts where a stretch has 2^31 sectors."""

PIECES: Final = 16
"""How much of a long answer is taken at a glance, in pieces of 64 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One run about one member of a chain: a `map`, or else a `check`.

    `stretch` is the part of the disk that the map is of; None for all of it. `dirty` says that the
    image was not closed in order by its last writer.
    """

    source: Source
    node: plans.Node
    secret: bytes
    mapped: bool
    dirty: bool = False
    stretch: plans.Stretch | None = None


class IntegrityCheck:
    """Checks one member of the chain after the other, during the conversion or before it.

    Use it as a context manager: leaving the block ends what still runs.
    """

    def __init__(
        self,
        grant: values.ConvertGrant,
        ends: Endpoints,
        kept: secrets.Secrets,
        runner: execution.Runner,
    ) -> None:
        self.warnings = _marked(ends)
        self._asked_source = grant.request.source
        self._limits = grant.limits
        self._result = ends.dest.fd
        self._runner = runner
        self._kept = kept
        self._ends = ends
        self._left = deque(_questions(ends, kept))
        self._running = contextlib.ExitStack()
        self._asked: tuple[execution.RunningProgram, _Answer] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What was raised goes along: the caller may have to be told before anything is waited for.
        self._running.__exit__(kind, value, traceback)

    def examine(self, ends: Endpoints) -> None:
        """Begin anew with the files of these ends, unless it is them that are examined.

        Of the same images: in these files they may be in the page cache.
        """
        if ends is self._ends:
            return
        self._running.close()
        self._asked = None
        self._ends = ends
        self._left = deque(_questions(ends, self._kept))
        self.warnings = _marked(ends)

    def runner(self) -> execution.Runner:
        """A runner during whose runs this goes on."""
        return replace(self._runner, on_tick=self.poll)

    @contextlib.contextmanager
    def required(self) -> Iterator[None]:
        """Have what is done in the block count only if all of the image is there.

        Where it fails of what was read, this is known first, for it tells why. Raises what finish
        raises.
        """
        try:
            yield
        except (conditions.ReadFailed, conditions.VerifyFailed):
            self.finish()
            raise
        self.finish()

    def poll(self) -> None:
        """Go on without waiting. What it raises is what finish would raise."""
        if self._asked is not None:
            running, answer = self._asked
            answer.on_tick(running.child)
            if all(running.read_outputs(0) for _ in range(PIECES)):
                return
            self._conclude(running, answer)
        self._ask()

    def finish(self) -> None:
        """Wait for all answers.

        Raises:
            conditions.ImageRefused: data is missing, or tables contradict each other.
            conditions.ImageDamaged, conditions.DamageNotAllowed: only reference counts are wrong.
            conditions.ReadFailed, conditions.WrongSecret, conditions.ImageInUse: it could not be
                examined.
            conditions.Stalled: nothing moved for the policy's `stall`.
            conditions.DurationExceeded: the policy's `duration` is over.
        """
        self._ask()
        while self._asked is not None:
            self._conclude(*self._asked)
            self._ask()

    def _ask(self) -> None:
        """Start on the next question, if there is one and none is open."""
        if self._asked is not None or not self._left:
            return
        question = self._left.popleft()
        kind = _Map if question.mapped else _Check
        answer = kind(self._runner, self._result, self._limits.stall_seconds, question)
        kept = secrets.Secrets(source=question.secret)
        with secrets.as_pipes(kept, self._runner.worker.setup.identity) as pipes:
            argv = _argv(question)
            inodes = execution.Inodes(read=(question.source.fd,), pipes=tuple(pipes.values()))
            bounds = limits.Limits(address_space_bytes=self._limits.memory_bytes)
            running = self._running.enter_context(
                self._runner.started(plans.with_secrets(argv, pipes), inodes, bounds, answer)
            )
        self._asked = running, answer

    def _conclude(self, running: execution.RunningProgram, answer: _Answer) -> None:
        outcome = running.wait_until_done()
        self._asked = None
        self._running.close()
        question = answer.question
        if isinstance(answer, _Check) and answer.damaged(outcome):
            if not question.dirty:
                damage.accept(self._asked_source, question.source, damage.COUNTS)
                path = question.source.place.path
                self.warnings.append(damage.warning(path, damage.COUNTS))
            self._left.appendleft(replace(question, mapped=True))
        elif not answer.is_conclusive(outcome):
            self._left.appendleft(replace(question, mapped=True))


def _marked(ends: Endpoints) -> list[results.Warning]:
    """The warnings of images that say of themselves that they are corrupt."""
    return [
        damage.warning(link.source.place.path, damage.MARKED)
        for link in ends.chain
        if link.info.corrupt
    ]


def _questions(ends: Endpoints, kept: secrets.Secrets) -> Iterator[Question]:
    """What is to be asked about a chain, in order."""
    for link, node in zip(ends.chain, ends.nodes(), strict=True):
        if link.info.format in CHECKED | MAPPED:
            for stretch in _stretches(link.info):
                yield Question(
                    source=link.source,
                    node=node,
                    # Only the first may be encrypted.
                    secret=kept.source if link.info.encrypted else b"",
                    mapped=link.info.format in MAPPED,
                    dirty=link.info.dirty,
                    stretch=stretch,
                )


def _stretches(info: stages.ProbedImage) -> Iterator[plans.Stretch | None]:
    """The parts in which an image is mapped."""
    piece = PIECE_BYTES.get(info.format)
    if piece is None or info.virtual_size_bytes <= piece:
        yield None
        return
    for start in range(0, info.virtual_size_bytes, piece):
        yield plans.Stretch(start_bytes=start, length_bytes=piece)


def _argv(question: Question) -> tuple[str, ...]:
    encrypted = bool(question.secret)
    if question.mapped:
        return plans.map_argv(question.node, encrypted=encrypted, stretch=question.stretch)
    return plans.check_argv(question.node, encrypted=encrypted)


class _Answer(conversion.Observer, abc.ABC):
    """What qemu-img says to a question, followed as a conversion is."""

    def __init__(
        self, runner: execution.Runner, result: int, stall_s: float, question: Question
    ) -> None:
        super().__init__(runner.context, result, stall_s)
        self.question = question

    def read(self, data: bytes) -> None:
        """Pass over a piece of standard output: it has no progress in it."""

    @abc.abstractmethod
    def is_conclusive(self, outcome: execution.Outcome) -> bool:
        """Judge the whole answer; False if a map is needed as well.

        Raises:
            conditions.ConvertError: the image is not to be converted.
        """

    def refused(self, problem: str) -> conditions.ImageRefused:
        """The condition that the image is in."""
        return conditions.ImageRefused(path=self.question.source.place.path, problem=problem)

    def failed(self, outcome: execution.Outcome) -> conditions.ConvertError:
        """Why there is no answer: in the words in which the conversion itself would fail."""
        place, output = self.question.source.place, outcome.stderr.lower()
        path = place.path
        log.warning(
            "check failed path=%r status=%d stderr=%r", path, outcome.status, outcome.excerpt
        )
        if image_info.NO_MEMORY in output:
            return self.refused("checking it takes more memory than allowed")
        if outcome.status < 0:
            return self.refused("qemu-img crashed while checking it")
        if any(phrase in output for phrase in conversion.IN_USE):
            return conditions.ImageInUse(path=path)
        if any(phrase in output for phrase in conversion.WRONG_SECRET):
            return conditions.WrongSecret(path=path)
        return conditions.ReadFailed(
            path=path, problem=conversion.strerror_in(outcome.stderr, place)
        )


class _Check(_Answer):
    """The answer of `check`: errors in the tables, and where the image should end."""

    def __init__(
        self, runner: execution.Runner, result: int, stall_s: float, question: Question
    ) -> None:
        super().__init__(runner, result, stall_s, question)
        self._complaints = damage.Complaints()

    def on_error_output(self, data: bytes) -> None:
        """Take a piece of the complaints: they may be more than what is kept of an output."""
        super().on_error_output(data)
        self._complaints.take(data)

    def damaged(self, outcome: execution.Outcome) -> bool:
        """Whether all that is wrong leaves the data where it is. Then a map is needed as well."""
        return outcome.status == CORRUPT and self._complaints.are_harmless()

    def is_conclusive(self, outcome: execution.Outcome) -> bool:
        if outcome.status not in {*SOUND, CORRUPT}:
            raise self.failed(outcome)
        if outcome.status == CORRUPT:
            log.info("corrupt path=%r stderr=%r", self.question.source.place.path, outcome.excerpt)
            raise self.refused(
                "its tables lead beyond its end, or contradict each other, as qemu-img check tells"
            )
        try:
            end = json.loads(outcome.stdout)["image-end-offset"]
            return bool(int(end) <= self.question.source.size_bytes)
        except image_info.NOT_UNDERSTOOD as error:
            raise self.refused(image_info.STRANGE) from error


class _Map(_Answer):
    """The answer of `map`: where in the file the data of each stretch of the disk lies."""

    def __init__(
        self, runner: execution.Runner, result: int, stall_s: float, question: Question
    ) -> None:
        super().__init__(runner, result, stall_s, question)
        self._reader = image_map.Reader()
        self._end_bytes = 0

    def read(self, data: bytes) -> None:
        """Take a piece of the list: it may be longer than what is kept of an output."""
        with self._understood():
            self._take(self._reader.take(data))

    def is_conclusive(self, outcome: execution.Outcome) -> bool:
        if outcome.status != 0:
            raise self.failed(outcome)
        with self._understood():
            self._take(self._reader.end())
        size = self.question.source.size_bytes
        if self._end_bytes > size:
            raise self.refused(
                f"its data reaches byte {self._end_bytes}, but the file ends at byte {size}"
            )
        return True

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except image_map.NotUnderstoodError as error:
            raise self.refused(image_info.STRANGE) from error

    def _take(self, entries: Iterator[image_map.Entry]) -> None:
        for entry in entries:
            # What reads as zero may have a place too, that was never written.
            if entry.data and entry.offset != image_map.NO_OFFSET:
                self._end_bytes = max(self._end_bytes, entry.offset + entry.length)
