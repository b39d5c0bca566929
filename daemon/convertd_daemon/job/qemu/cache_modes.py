"""Choose how an image uses the host's page cache, from what was found out. Pure: no system call.

A conversion must leave the page cache to the guests, and be on disk at its end. Past the page cache
(`none`) both hold by themselves. Through it (`writeback`) they hold where the result is written
back as it goes, and dropped: see write_behind. Never `unsafe`, which is what no mode means to qemu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, values

if TYPE_CHECKING:
    from convertd_daemon.job import stages

DIRECT_MODES: Final = frozenset({values.CacheMode.NONE, values.CacheMode.DIRECTSYNC})

GAIN: Final = 1.5
"""How much more a disk must take through the page cache to be written so: copying takes processor
time, of which qemu-img gets what others leave."""

MIB: Final = 1024 * 1024


def of_source(refusal: str | None, *, in_memory: bool) -> results.CacheChoice:
    """How the source is read; `refusal` is the kernel's error for reading with O_DIRECT."""
    if refusal is not None:
        reason = f"the source can't be read past the page cache: {refusal}"
        return results.CacheChoice(mode=values.CacheMode.WRITEBACK, reason=reason)
    if in_memory:
        reason = "the source is in the page cache already"
        return results.CacheChoice(mode=values.CacheMode.WRITEBACK, reason=reason)
    reason = "the source can be read past the page cache"
    return results.CacheChoice(mode=values.CacheMode.NONE, reason=reason)


def of_dest(grant: values.ConvertGrant, refusal: str | None) -> results.CacheChoice:
    """How the destination is written; `refusal` is the kernel's error for doing so with O_DIRECT.

    Raises:
        conditions.NoDirectWrites: a mode was asked for that the destination can't do.
    """
    asked = grant.request.cache_mode
    if asked is values.CacheMode.AUTO:
        return _chosen(refusal)
    if asked in DIRECT_MODES and refusal is not None:
        raise conditions.NoDirectWrites(path=grant.dest.path, mode=asked.value, problem=refusal)
    return results.CacheChoice(mode=asked, reason="asked for")


def is_quicker_buffered(rates: stages.WriteRates) -> bool:
    """Whether a trial is in favour of the page cache."""
    return rates.buffered_bytes_per_s >= GAIN * rates.direct_bytes_per_s


def after_trial(rates: stages.WriteRates) -> results.CacheChoice:
    """How a destination that takes direct writes is written, where a trial was made."""
    direct, buffered = _rate(rates.direct_bytes_per_s), _rate(rates.buffered_bytes_per_s)
    if not is_quicker_buffered(rates):
        reason = (
            f"the destination takes direct writes: {direct} in a trial, "
            f"{buffered} through the page cache"
        )
        return results.CacheChoice(mode=values.CacheMode.NONE, reason=reason)
    reason = (
        "written back as it goes, and dropped from the page cache: "
        f"{buffered} in a trial, {direct} past the page cache"
    )
    return results.CacheChoice(mode=values.CacheMode.WRITEBACK, reason=reason)


def is_written_behind(
    grant: values.ConvertGrant, chosen: results.CacheChoice, *, on_device: bool
) -> bool:
    """Whether a result is to leave the page cache: unless the caller asked for the mode."""
    return (
        grant.request.cache_mode is values.CacheMode.AUTO
        and chosen.mode is values.CacheMode.WRITEBACK
        and not on_device
    )


def _chosen(refusal: str | None) -> results.CacheChoice:
    if refusal is None:
        reason = "the destination takes direct writes"
        return results.CacheChoice(mode=values.CacheMode.NONE, reason=reason)
    reason = f"the destination takes no direct writes: {refusal}"
    return results.CacheChoice(mode=values.CacheMode.WRITEBACK, reason=reason)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / MIB:.0f} MiB/s"
