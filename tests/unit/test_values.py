"""What passes between stages can't be changed on its way, nor be made by position."""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType
from typing import Any, Final

import pytest

from convertd_core import values
from convertd_daemon import channel
from convertd_daemon.job.files import file_dest, paths, publish
from convertd_daemon.job.qemu import plan, verification
from convertd_daemon.policy import decide

MODULES: Final = (channel, verification, values, paths, plan, decide, publish, file_dest)


def values_of(module: ModuleType) -> list[type[Any]]:
    """The dataclasses that a module defines."""
    return [
        kind
        for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)
        if isinstance(kind, type) and kind.__module__ == module.__name__
    ]


VALUES: Final = [
    pytest.param(kind, id=f"{module.__name__.rpartition('.')[2]}.{kind.__name__}")
    for module in MODULES
    for kind in values_of(module)
]


@pytest.mark.parametrize("kind", VALUES)
def test_value_class_is_frozen_slotted_and_keyword_only(kind: type[Any]) -> None:
    """So that what was decided once stays so."""
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)
    by_position = [field.name for field in dataclasses.fields(kind) if not field.kw_only]
    assert by_position == []
