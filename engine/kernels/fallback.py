"""What is said, once, where kernels can't be had and torch's operations serve in their place."""

from __future__ import annotations

import logging
from functools import cache

import torch

from baton.model_files import in_one_line

log = logging.getLogger(__name__)


def warn_of_torch(device: torch.device, reason: Exception | str) -> None:
    _warn_once(device, reason if isinstance(reason, str) else f"{type(reason).__name__}: {in_one_line(reason)}")


@cache
def _warn_once(device: torch.device, reason: str) -> None:
    log.warning("Triton's kernels cannot serve %s (%s): torch's operations do, many times slower", device, reason)
