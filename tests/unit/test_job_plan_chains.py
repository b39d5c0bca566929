"""Plans of chains: what belongs to the source itself, and what to those below it."""

from __future__ import annotations

import json
from typing import Final

import grants
import pytest

from convertd_core import values
from convertd_daemon.job import stages
from convertd_daemon.job.qemu import plan

MIB: Final = 1024 * 1024

RULES: Final = grants.Rules(roots=(grants.files("/images"),))
REQUEST: Final = grants.request("/images/in.qcow2", "/images/out", "qcow2")
CHAIN: Final = (plan.Node(format="qcow2", fd=7), plan.Node(format="luks", fd=8))


def member(virtual_mib: int, image_format: str = "qcow2") -> stages.ChainMember:
    """One image, without a byte allocated."""
    info = stages.ProbedImage(
        format=image_format, virtual_size_bytes=virtual_mib * MIB, actual_size_bytes=0
    )
    return stages.ChainMember(path="/images/in.qcow2", info=info)


def test_passphrase_is_used_for_the_first_chain_member_only() -> None:
    """Whatever the others are."""
    top = json.loads(plan.graph(CHAIN, encrypted=True).removeprefix("json:"))
    assert top["encrypt"] == {"format": "luks", "key-secret": plan.SOURCE_SECRET}
    assert "key-secret" not in top
    assert "key-secret" not in top["backing"]


def test_source_not_encrypted_gets_no_passphrase() -> None:
    """It would not be opened with one."""
    assert plan.graph(CHAIN) == plan.graph(CHAIN, encrypted=False)
    assert "key-secret" not in plan.graph(CHAIN)


@pytest.mark.parametrize("virtual_mib", [(64, 16), (16, 64)])
def test_preallocated_space_is_the_size_of_the_first_chain_member(
    virtual_mib: tuple[int, int],
) -> None:
    """An overlay may be larger or smaller than what it stands on."""
    chain = tuple(member(size) for size in virtual_mib)
    asked = grants.to(REQUEST, format="raw", preallocation=values.Preallocation.FALLOC)
    facts = plan.Facts(
        chain=(CHAIN[0], plan.Node(format="qcow2", fd=8)),
        dest=plan.Node(format="raw", fd=9),
        source_direct=None,
        dest_direct=None,
        available_bytes=0,
    )
    assert plan.make(RULES.convert(asked), chain, facts).needed_bytes == virtual_mib[0] * MIB


@pytest.mark.parametrize("method", values.Compression)
def test_each_compression_method_compresses(method: values.Compression) -> None:
    """Also the one that is left to the format."""
    dest = values.Destination(path="/images/out", format="qcow2", compression=method)
    assert plan.compresses(dest) == (method is not values.Compression.NONE)
