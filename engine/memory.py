"""How much memory is left on a device."""

from __future__ import annotations

from pathlib import Path

import torch


def available(device: torch.device) -> int:
    """Bytes that could be had now: of device memory, or of host memory, where a container's own limit counts too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as meminfo:
        fields = dict(line.split(":", 1) for line in meminfo)
    return int(min(int(fields["MemAvailable"].split()[0]) * 1024, _cgroup_room()))


def _cgroup_room() -> float:
    """What a container's own limit leaves; infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else max(0, int(limit) - used)
