"""Launch parameters by kernel, device and head size: a device's own file in configs/ where there is one, the default
elsewhere. Imports neither torch nor triton."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

_CONFIGS = Path(__file__).parent / "configs"
_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """What a kernel has no use for stays as it is here."""

    num_warps: int
    num_stages: int
    """How many tiles of keys and values are on their way at a time."""
    block_m: int = 1
    """Rows of a program: of attention, heads of one group times tokens; elsewhere heads."""
    block_n: int = 1
    """Positions of a tile of keys and values."""
    programs: int = 1
    """So many keep the device busy, short ones among them."""
    max_splits: int = 1
    split_positions: int = 1
    """A split has at least so many, so that what it saves is more than what reducing it costs."""

    def for_element(self, num_bytes: int) -> LaunchConfig:
        """Configurations are for 16 bits; in 32, tiles of the same bytes, and one at a time, since products that are
        not rounded keep their operands in registers."""
        if num_bytes <= 2:
            return self
        return replace(self, block_m=max(1, self.block_m // 2), block_n=max(_LEAST_N, self.block_n // 2), num_stages=1)


_LEAST_N = 16  # below it tl.dot has no instruction

Configure = Callable[[str, str, int], LaunchConfig]
"""Kernel, device name and head size to launch parameters."""


@cache
def config(kernel: str, device_name: str, head_dim: int) -> LaunchConfig:
    """Of the smallest head size in the file that is not below `head_dim`. `device_name` as CUDA gives it."""
    own, default = _read(device_name), _read(_DEFAULT)
    by_head_dim = own[kernel] if kernel in own else default[kernel]
    fitting = [int(size) for size in by_head_dim if int(size) >= head_dim]
    assert fitting, f"{kernel} has no configuration for heads of {head_dim}"
    return LaunchConfig(**by_head_dim[str(min(fitting))])


def file_name(device_name: str) -> str:
    """`NVIDIA H200` is nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def path_of(device_name: str) -> Path:
    """Where a device's own parameters are, if there are any."""
    return _CONFIGS / f"{file_name(device_name)}.json"


@cache
def _read(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    path = path_of(name)
    read: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}
    return read
