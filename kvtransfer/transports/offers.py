"""What a source offers of its memory itself, without a server: the ways that need nothing but that others reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.errors import ConfigError
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.transports import cuda_ipc, nixl_agent, shm
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.nixl_source import NixlSource

_OF_MEMORY = {cuda_ipc.NAME, shm.NAME, nixl_agent.NAME}


def offer_memory(
    memory: PoolMemory, allowed: Sequence[str], on_close: Callable[[Callable[[], None]], object]
) -> list[Endpoint]:
    """Endpoints of the transports in `allowed` that can reach `memory`. `on_close` is given what is to be called before
    the memory ends. Raises ConfigError where nixl is allowed and can't be used, or nothing of `allowed` ever could."""
    endpoints: list[Endpoint] = []
    if cuda_ipc.NAME in allowed and (device := cuda_ipc.cuda_ipc_endpoint(memory)) is not None:
        endpoints.append(device)
    host = memory if isinstance(memory, HostMemory) and memory.fd >= 0 else None
    if shm.NAME in allowed and host is not None:
        endpoints.append(shm.shm_endpoint(host))
    if nixl_agent.NAME in allowed and host is not None:
        source = NixlSource(host)
        on_close(source.close)
        endpoints.append(source.endpoint())
    if not endpoints and set(allowed) <= _OF_MEMORY:
        where = "in host memory" if isinstance(memory, HostMemory) else "in device memory"
        raise ConfigError(
            f"--transport {' or '.join(allowed)} can't reach this worker's KV pool, which is {where}; auto and tcp can"
        )
    return endpoints
