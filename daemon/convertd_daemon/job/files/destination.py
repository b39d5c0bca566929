"""What every destination can do, whether it is a new file or a block device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from convertd_core import conditions, results, values
    from convertd_daemon.job import stages
    from convertd_daemon.job.qemu.execution import Inodes
    from convertd_daemon.sandbox import landlock


class Destination(Protocol):
    """What a conversion writes. Its descriptor is open since before qemu-img started.

    Implemented by file_dest.FileDest and device_dest.DeviceDest.
    """

    @property
    def place(self) -> values.Place:
        """Where it is or will be, as the caller named it."""

    @property
    def fd(self) -> int:
        """The descriptor, for reading and writing. Borrowed."""

    @property
    def on_device(self) -> bool:
        """Whether the image is written in place: no length of its own, and nothing to publish."""

    @property
    def alias(self) -> str:
        """A path to the descriptor with the right last name, for a format that stores it; or ""."""

    @property
    def expected_warnings(self) -> tuple[results.Warning, ...]:
        """The warnings that the result will have, as far as they are known before it is written."""

    @property
    def undefined_on_failure(self) -> str:
        """The path whose content is undefined if the conversion fails once begun; "" for none."""

    def inodes(self) -> Inodes:
        """What qemu-img needs to write it."""

    def rules(self) -> tuple[landlock.Rule, ...]:
        """What the job needs to write and to publish it."""

    def direct_refusal(self) -> str | None:
        """The kernel's objection to direct writes; None if they work. Before anything is written.

        Raises:
            conditions.WriteFailed, conditions.NoSpace, conditions.QuotaExceeded: the trial could
                not be undone.
        """

    def write_rates(
        self, grant: values.ConvertGrant, plan: stages.ConversionPlan, /
    ) -> stages.WriteRates | None:
        """Try how the disk is written more quickly, if that may change the plan; None if not.

        Before anything is written.

        Raises:
            conditions.WriteFailed, conditions.NoSpace, conditions.QuotaExceeded: the trial could
                not be undone.
        """

    def available_bytes(self) -> int:
        """The room there is for the image."""

    def check_room(self, plan: stages.ConversionPlan, source: int, /) -> None:
        """Refuse a destination that can't hold the image now, or that is the image itself.

        `source` is the source's descriptor.

        Raises:
            conditions.NoSpace, conditions.DeviceTooSmall: it can't hold the image.
            conditions.BadPath: it is the device that the source is on, by another name.
        """

    def no_space(self, needed_bytes: int, /) -> conditions.ConvertError:
        """The condition for an ENOSPC while the image was being written."""

    def flush(self, plan: stages.ConversionPlan, /) -> tuple[results.Warning, ...]:
        """Put the result on disk, not yet its name. Gives what the file system did not keep.

        Raises:
            conditions.OwnerNotKept: owner or mode, and the root requires them.
            conditions.WriteFailed, conditions.NoSpace, conditions.QuotaExceeded: it could not be
                flushed.
        """

    def assign_name(self, grant: values.ConvertGrant, /) -> bool:
        """Publish the flushed result; True if something was there before. See publish.assign_name.

        Raises:
            conditions.ConvertError: as publish.assign_name.
        """
