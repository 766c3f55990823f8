"""What a plant is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Change = tuple[Any, str, Any]
"""A class, the name of one of its members, and what is to stand there."""


@dataclass(frozen=True)
class Plant:
    name: str
    upstream: str
    """Where it was reported."""
    what: str
    changes: tuple[Change, ...]
