"""A configuration as one table: `section.key` and value. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat_keys(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their full keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat_keys(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
