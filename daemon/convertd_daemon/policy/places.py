"""Which root decides about a path: the longest that contains it. Pure.

Both a path that a caller names and one that an image names are placed here, so that neither can
reach a nested root by way of the root around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convertd_core import values

if TYPE_CHECKING:
    from collections.abc import Sequence


def place_of(path: str, roots: Sequence[values.Root]) -> values.Place | None:
    """Find the longest of `roots` that contains a path, which is absolute and normal.

    None if there is none, and for a root itself, which is no image.
    """
    around = [root for root in roots if root.path == path or root.contains(path)]
    root = max(around, key=lambda root: len(root.path), default=None)
    if root is None or root.path == path:
        return None
    return values.Place(
        root=root,
        below=path.removeprefix(root.path).lstrip("/"),
        others=tuple(other for other in roots if other is not root),
    )
