"""Which transport two workers use: the first that the source offers, the setting allows, and that works from here."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from baton.errors import HandoffFailed, TransferRefused
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.threads import Threads
from kvtransfer.transports import fake, shm, tcp
from kvtransfer.transports.base import MAX_ADDRESS_BYTES, Connection, Endpoint
from kvtransfer.transports.fake import FakeNetwork
from kvtransfer.transports.shm import ShmConnection
from kvtransfer.transports.tcp import TcpConnection

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 128
_BY_SETTING = {"auto": (shm.NAME, tcp.NAME), "shm": (shm.NAME,), "tcp": (tcp.NAME,), "fake": (fake.NAME,)}


def transport_names(setting: str) -> tuple[str, ...]:
    """What `--transport` allows, best first. `fake` is for tests and the simulator."""
    return _BY_SETTING[setting]


class Connector:
    """The puller's connections, one to an endpoint, kept for the next pull."""

    def __init__(
        self, memory: PoolMemory, threads: Threads, *, setting: str = "auto", network: FakeNetwork | None = None
    ) -> None:
        """`network` is what `fake` endpoints are looked up in."""
        self.names = transport_names(setting)
        self._setting = setting
        self._memory = memory
        self._threads = threads
        self._network = network
        self._connections: OrderedDict[Endpoint, Connection] = OrderedDict()

    def beside(self, memory: PoolMemory) -> Connector:
        """One like this whose connections bring blocks into `memory`."""
        return Connector(memory, self._threads, setting=self._setting, network=self._network)

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
            return await ShmConnection.connect(endpoint.address, self._memory, self._threads.memory)
        if endpoint.transport == tcp.NAME:
            return TcpConnection.connect(endpoint.address, self._memory, self._threads.network)
        if self._network is None:
            raise TransferRefused("there is no fake network here")
        return self._network.connect(endpoint.address, self._memory)


def offers_shm(memory: PoolMemory) -> HostMemory | None:
    """The memory, if other processes of this host can map it."""
    return memory if isinstance(memory, HostMemory) and memory.fd >= 0 else None
