"""Which transport two workers use: the first that the source offers, the setting allows, and that works from here."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from baton.errors import HandoffFailed, TransferRefused
from kvtransfer.checksum import Copier, copy_blocks
from kvtransfer.memory import PoolMemory
from kvtransfer.threads import Threads
from kvtransfer.transports import cuda_ipc, fake, nixl, nixl_agent, shm, tcp
from kvtransfer.transports.base import MAX_ADDRESS_BYTES, Connection, Endpoint
from kvtransfer.transports.cuda_ipc import CudaIpcConnection
from kvtransfer.transports.fake import FakeNetwork
from kvtransfer.transports.shm import ShmConnection
from kvtransfer.transports.tcp import TcpConnection

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 128
_BY_SETTING = {
    "auto": (cuda_ipc.NAME, shm.NAME, tcp.NAME),
    "shm": (shm.NAME,),
    "tcp": (tcp.NAME,),
    # Not in auto: an agent of it takes half a second and, with a network card for RDMA, pins the whole pool.
    "nixl": (nixl_agent.NAME,),
    "cuda_ipc": (cuda_ipc.NAME,),
    "fake": (fake.NAME,),
}


def transport_names(setting: str) -> tuple[str, ...]:
    """What `--transport` allows, best first. `fake` is for tests and the simulator."""
    return _BY_SETTING[setting]


class Connector:
    """The puller's connections, one to an endpoint, kept for the next pull."""

    def __init__(
        self,
        memory: PoolMemory,
        threads: Threads,
        *,
        setting: str = "auto",
        copier: Copier = copy_blocks,
        network: FakeNetwork | None = None,
    ) -> None:
        """`network` is what `fake` endpoints are looked up in. Raises ConfigError where nixl is wanted and missing."""
        self.names = transport_names(setting)
        if nixl_agent.NAME in self.names:
            nixl_agent.check_installed()
        self._setting = setting
        self._memory = memory
        self._threads = threads
        self._copier = copier
        self._network = network
        self._connections: OrderedDict[Endpoint, Connection] = OrderedDict()

    def beside(self, memory: PoolMemory) -> Connector:
        """One like this whose connections bring blocks into `memory`."""
        return Connector(
            memory, self._threads, setting=self._setting, copier=self._copier, network=self._network
        )  # fmt: skip

    async def open(self, endpoints: Sequence[Endpoint]) -> tuple[str, Connection]:
        """The transport's name and the way to the source. Raises TransferRefused, saying what was tried."""
        tried: list[str] = []
        for name in self.names:
            for endpoint in endpoints:
                if endpoint.transport == name:
                    try:
                        return name, await self._to(endpoint)
                    except HandoffFailed as error:
                        tried.append(f"{name}: {error.message}")
        offered = ", ".join(sorted({e.transport[:16] for e in endpoints})) or "none"
        why = f" ({'; '.join(tried)})" if tried else ""
        raise TransferRefused(f"no transport works: the source offers {offered}, this worker can {self.names}{why}")

    async def sweep(self) -> None:
        """Lets go of dead sources, whose memory a mapping would keep, and of the longest unused."""
        for endpoint, connection in list(self._connections.items()):
            if not connection.alive or len(self._connections) > _MAX_CONNECTIONS:
                self._connections.pop(endpoint, None)
                await connection.close()

    async def close(self) -> None:
        while self._connections:
            _, connection = self._connections.popitem()
            await connection.close()

    async def _to(self, endpoint: Endpoint) -> Connection:
        if len(endpoint.address) > MAX_ADDRESS_BYTES:
            raise TransferRefused(f"the address has {len(endpoint.address)} bytes; at most {MAX_ADDRESS_BYTES}")
        known = self._connections.get(endpoint)
        if known is not None and known.alive:
            self._connections.move_to_end(endpoint)
            return known
        connection = await self._connect(endpoint)
        other = self._connections.get(endpoint)
        if other is not None and other.alive:  # another pull was faster
            await connection.close()
            return other
        self._connections[endpoint] = connection
        await self.sweep()
        return connection

    async def _connect(self, endpoint: Endpoint) -> Connection:
        if endpoint.transport == shm.NAME:
            return await ShmConnection.connect(endpoint.address, self._memory, self._threads.memory, self._copier)
        if endpoint.transport == cuda_ipc.NAME:
            return await CudaIpcConnection.connect(endpoint.address, self._memory, self._threads.memory)
        if endpoint.transport == tcp.NAME:
            return TcpConnection.connect(endpoint.address, self._memory, self._threads.network)
        if endpoint.transport == nixl_agent.NAME:
            return await nixl.NixlConnection.connect(endpoint.address, self._memory, self._threads.network)
        if self._network is None:
            raise TransferRefused("there is no fake network here")
        return self._network.connect(endpoint.address, self._memory)
