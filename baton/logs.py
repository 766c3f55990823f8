"""One form for every log line: when, who, how bad, what."""

from __future__ import annotations

import logging
import sys


def configure(level: str, part: str) -> None:
    """Logs to stderr; stdout is for answers and ready lines."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s {part} %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
