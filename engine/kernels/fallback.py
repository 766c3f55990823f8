"""What is said where kernels can't be had and torch's operations serve in their place."""

from __future__ import annotations

import logging

import torch

from baton.model_files import in_one_line

log = logging.getLogger(__name__)


def warn_of_torch(device: torch.device, reason: Exception | str) -> None:
    said = reason if isinstance(reason, str) else f"{type(reason).__name__}: {in_one_line(reason)}"
    log.warning("Triton's kernels cannot serve %s (%s): torch's operations do, many times slower", device, said)
