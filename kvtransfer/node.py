"""One worker's transfers put together: the source's side and the puller's over one pool, with threads and tasks.

Owns the order in which the parts are started and stopped, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio

from baton.clock import Clock
from baton.config import TransferConfig
from baton.errors import ConfigError
from baton.ids import AttemptId, Incarnation, WorkerId
from baton.layout import KVLayout
from baton.metrics import TransferMetrics
from baton.v1.transfer_pb2_grpc import add_TransferServicer_to_server
from kvtransfer.destination import Puller
from kvtransfer.gate import ReadPermits
from kvtransfer.memory import PoolMemory
from kvtransfer.service import TransferService
from kvtransfer.source import SourceLedger
from kvtransfer.threads import Threads
from kvtransfer.transports import shm, tcp
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.chooser import Connector, offers_shm, transport_names
from kvtransfer.transports.tcp_server import TcpServer


class TransferNode:
    def __init__(
        self,
        *,
        memory: PoolMemory,
        layout: KVLayout,
        worker_id: WorkerId,
        incarnation: Incarnation,
        address: str,
        host: str,
        config: TransferConfig,
        on_terminal: Callable[[AttemptId], None],
        clock: Clock,
        metrics: TransferMetrics,
        advertise_host: str = "",
    ) -> None:
        """`address` is the `host:port` of this worker's gRPC server, as tickets tell it; the data server listens on a
        free port of `host`. `on_terminal`: see SourceLedger. Raises ConfigError where `config.transport` can't be had,
        PortInUse where `host` can't be listened on."""
        if memory.block_bytes != layout.block_bytes:
            raise ConfigError(f"a block of {layout} has {layout.block_bytes} bytes, the pool's {memory.block_bytes}")
        names = transport_names(config.transport)
        shared = offers_shm(memory) if shm.NAME in names else None
        if shared is None and tcp.NAME not in names:
            raise ConfigError(f"transport {config.transport} needs a pool in host memory; use auto or tcp")
        permits = ReadPermits()
        self._threads = Threads.create()
        self._endpoints: list[Endpoint] = []
        if shared is not None:
            self._endpoints.append(shm.shm_endpoint(shared))
        self._server: TcpServer | None = None
        if tcp.NAME in names:
            self._server = TcpServer(memory, permits, host=host, advertise_host=advertise_host)
            self._endpoints.append(self._server.endpoint())
        self.ledger = SourceLedger(
            memory=memory,
            layout=layout,
            worker_id=worker_id,
            address=address,
            incarnation=incarnation,
            lease_seconds=config.lease_seconds,
            on_terminal=on_terminal,
            clock=clock,
            metrics=metrics,
            executor=self._threads.memory,
            permits=permits,
        )
        self.puller = Puller(
            memory=memory,
            layout=layout,
            worker_id=worker_id,
            connector=Connector(memory, self._threads, setting=config.transport),
            threads=self._threads,
            clock=clock,
            metrics=metrics,
        )
        self._service = TransferService(self.ledger, lambda: self._endpoints, metrics)
        self._tasks: list[asyncio.Task[None]] = []

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        add_TransferServicer_to_server(self._service, server)

    def start(self) -> None:
        """On the running event loop: from now on leases run out."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self.ledger.run_reaper(), name="transfer reaper"),
            loop.create_task(self.puller.sweep(), name="transfer sweep"),
        ]

    async def drain(self, seconds: float) -> bool:
        """Waits until nobody needs this worker's blocks any more; False where `seconds` did not suffice."""
        return await self.ledger.drain(seconds)

    async def close(self) -> None:
        """Gives up what is left, on both sides. After the gRPC server has stopped."""
        for id in self.ledger.live():
            self.ledger.abort(id)
        await self.puller.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._server.close)
        self._threads.close()
