"""Where in a config pydantic found a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def path_parts(location: Sequence[int | str], tree: Any) -> list[str]:
    """Pydantic's location without the tags that it adds for discriminated unions."""
    parts: list[str] = []
    node = tree
    for part in location:
        if isinstance(node, dict) and part not in node and node.get("kind") == part:
            continue
        parts.append(str(part))
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return parts
