"""What the contract suite must know of each transport: how it is served, and how one connects. A new transport is a new
class here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from typing import ClassVar

from kvtransfer.gate import ReadPermits
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Connection, Endpoint
from kvtransfer.transports.cuda_ipc import CudaIpcConnection, cuda_ipc_endpoint
from kvtransfer.transports.fake import FakeNetwork, FakeSource, Faults
from kvtransfer.transports.nixl import NixlConnection
from kvtransfer.transports.nixl_source import NixlPeer, NixlSource
from kvtransfer.transports.shm import ShmConnection, shm_endpoint
from kvtransfer.transports.tcp import TcpConnection
from kvtransfer.transports.tcp_server import TcpServer
from tests.kvtransfer.staged import StagedMemory

PATIENCE = 0.5
"""Seconds that a transport waits for a silent source in these tests."""


class TransportRig(ABC):
    name: ClassVar[str]
    asks_source: ClassVar[bool] = True
    """The source answers every read: it refuses what is not to be read, and a fetch feels its death."""
    has_processes: ClassVar[bool] = True
    """The source may be a process of its own."""

    @staticmethod
    def missing() -> str:
        """What this machine lacks for it."""
        return ""

    @abstractmethod
    def serve(self, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        """Lets it be read, until `close`."""

    def serve_again(self, old: Endpoint, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        """After `close`: serves another incarnation's pool. What the old endpoint would be if it led there."""
        self.serve(memory, permits)
        return old

    @abstractmethod
    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection: ...

    def close(self) -> None:  # noqa: B027 - most have nothing to end but the memory
        """Ends what is served."""

    def spoiled(self, address: bytes) -> Iterator[bytes]:
        """Addresses that lead nowhere."""
        yield b""
        yield address[:-1] if self.has_size else b"?"
        yield bytes(len(address))
        yield b"\xff" * len(address)
        for at in self.spots:
            yield address[:at] + bytes([address[at] ^ 0x41]) + address[at + 1 :]

    has_size: ClassVar[bool] = True
    """A part of an address is none."""
    spots: ClassVar[tuple[int, ...]] = ()
    """Bytes of an address that must be as they are."""


class ShmRig(TransportRig):
    name = "shm"
    asks_source = False
    spots = (0, 5, 9, 16, 32, 47)

    def serve(self, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        return shm_endpoint(host(memory))

    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection:
        return await ShmConnection.connect(endpoint.address, memory, threads.memory)


class CompiledShmRig(ShmRig):
    """As workers have it: copied and summed by compiled code, where there is a compiler."""

    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection:
        from worker.copying import block_copier  # loads torch

        return await ShmConnection.connect(endpoint.address, memory, threads.memory, block_copier(memory))


class TcpRig(TransportRig):
    name = "tcp"
    has_size = False

    def __init__(self) -> None:
        self._servers: list[TcpServer] = []

    def serve(self, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        return self._serve(memory, permits, 0)

    def serve_again(self, old: Endpoint, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        again = self._serve(memory, permits, int(old.address.rpartition(b":")[2]))
        assert again == old
        return again

    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection:
        return TcpConnection.connect(endpoint.address, memory, threads.network, block_seconds=PATIENCE)

    def close(self) -> None:
        while self._servers:
            self._servers.pop().close()

    def _serve(self, memory: PoolMemory, permits: ReadPermits, port: int) -> Endpoint:
        server = TcpServer(memory, permits, port=port, send_seconds=1.0, request_seconds=1.0)
        self._servers.append(server)
        return server.endpoint()


class FakeRig(TransportRig):
    name = "fake"
    has_processes = False
    has_size = False

    def __init__(self) -> None:
        self.network = FakeNetwork(faults=Faults(delay=0.001, duplicate=0.5, timeout=PATIENCE))
        self._sources: list[FakeSource] = []

    def serve(self, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        source = self.network.add("source", memory, permits)
        self._sources.append(source)
        return source.endpoint()

    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection:
        return self.network.connect(endpoint.address, memory)

    def close(self) -> None:
        while self._sources:
            self._sources.pop().die()


class CudaIpcRig(TransportRig):
    """On the memory of staged.py; tests/worker has it on a device."""

    name = "cuda_ipc"
    asks_source = False
    spots = (0, 8, 24, 28, 32, 96, 104, 112, 117, 121, 128, 144)

    def serve(self, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        endpoint = cuda_ipc_endpoint(device(memory))
        assert endpoint is not None
        return endpoint

    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection:
        return await CudaIpcConnection.connect(endpoint.address, device(memory), threads.memory)


class NixlRig(TransportRig):
    name = "nixl"
    asks_source = False
    spots = (0, 8, 16, 24, 32, 48, 56, 80, 200)

    def __init__(self) -> None:
        self._sources: list[NixlSource] = []

    @staticmethod
    def missing() -> str:
        return "" if find_spec("nixl") else "NIXL is not installed (pip install 'baton[nixl]')"

    def serve(self, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        source = NixlSource(host(memory))
        self._sources.append(source)
        return source.endpoint()

    def serve_again(self, old: Endpoint, memory: PoolMemory, permits: ReadPermits) -> Endpoint:
        new = NixlPeer.parse(self.serve(memory, permits).address)
        return Endpoint(old.transport, new._replace(nonce=NixlPeer.parse(old.address).nonce).pack())

    async def connect(self, endpoint: Endpoint, memory: PoolMemory, threads: Threads) -> Connection:
        return await NixlConnection.connect(endpoint.address, memory, threads.network, read_seconds=PATIENCE)

    def close(self) -> None:
        while self._sources:
            self._sources.pop().close()


RIGS: dict[str, type[TransportRig]] = {
    "shm": ShmRig,
    "shm_compiled": CompiledShmRig,
    "tcp": TcpRig,
    "fake": FakeRig,
    "cuda_ipc": CudaIpcRig,
    "nixl": NixlRig,
}


def host(memory: PoolMemory) -> HostMemory:
    """What others of this host can reach of it."""
    if isinstance(memory, StagedMemory):
        return memory.memory
    assert isinstance(memory, HostMemory)
    return memory


def device(memory: PoolMemory) -> StagedMemory:
    """It, or a pool that is like it but for the device that it is on."""
    return memory if isinstance(memory, StagedMemory) else StagedMemory(host(memory), kind=memory.checksum_kind)
