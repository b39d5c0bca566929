"""What another process does at an exact moment: just before or after one of our own calls.

A race would hit such a moment once in a thousand attempts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from types import ModuleType
from typing import Any
from unittest import mock

Act = Callable[[], object]


@contextlib.contextmanager
def before(module: ModuleType, name: str, *acts: Act | None) -> Iterator[None]:
    """Act just before the first, second, third … call of a module's function; None lets one pass.

    All acts must have happened by the end of the block.
    """
    with _acting(module, name, acts, is_before=True):
        yield


@contextlib.contextmanager
def after(module: ModuleType, name: str, *acts: Act | None) -> Iterator[None]:
    """Act just after the calls have returned; else as `before`."""
    with _acting(module, name, acts, is_before=False):
        yield


@contextlib.contextmanager
def _acting(
    module: ModuleType, name: str, acts: tuple[Act | None, ...], *, is_before: bool
) -> Iterator[None]:
    original, due = getattr(module, name), list(acts)
    # A thread of its own: rights that our code has taken on are those of one thread. Source:
    # setfsuid(2).
    with futures.ThreadPoolExecutor(max_workers=1) as other:
        other.submit(int).result()

        def call(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as they come
            act = due.pop(0) if due else None
            if act is not None and is_before:
                other.submit(act).result()
            result = original(*arguments, **options)
            if act is not None and not is_before:
                other.submit(act).result()
            return result

        with mock.patch.object(module, name, call):
            yield
    assert due == [], f"{name} was called too seldom"
