"""Puts both sides of block transfers into a worker: the ledger of what it offers, and the puller of what it fetches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from baton.clock import MonotonicClock
from baton.ids import AttemptId
from baton.v1 import transfer_pb2_grpc
from kvtransfer.destination import OnVerified, Puller
from kvtransfer.gate import ReadPermits
from kvtransfer.refusal import Refusals
from kvtransfer.service import TransferService
from kvtransfer.source import SourceLedger
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.chooser import Connector, transport_names
from kvtransfer.transports.offers import offer_memory
from kvtransfer.transports.tcp_server import TcpServer
from worker.copying import block_copier
from worker.core import WorkerCore
from worker.fetching import Fetching
from worker.lending import Lending
from worker.role import SendCommand
from worker.server import Surroundings


@dataclass(frozen=True)
class Transfers:
    """A role's means, each with its own task or threads, which end with the worker."""

    ledger: SourceLedger
    puller: Puller
    lending: Lending
    fetching: Fetching


def make_transfers(
    core: WorkerCore,
    send: SendCommand,
    around: Surroundings,
    set_over: Callable[[AttemptId], None],
    on_verified: OnVerified | None = None,
) -> Transfers:
    """`set_over` hears of each offered set that has ended. `on_verified` is for tests alone, as its own words say."""
    threads = Threads.create()
    around.stack.callback(threads.close)
    permits = ReadPermits()
    ledger = SourceLedger(
        memory=around.built.memory,
        layout=around.built.layout,
        worker_id=around.record.id,
        address=around.record.address,
        incarnation=around.record.incarnation,
        lease_seconds=around.config.transfer.lease_seconds,
        on_terminal=set_over,
        clock=MonotonicClock(),
        metrics=around.metrics,
        executor=threads.memory,
        permits=permits,
    )
    lending = Lending(ledger, send)
    endpoints = _endpoints(around, permits)
    service = TransferService(ledger, lambda: endpoints, around.metrics, lending.lend)
    transfer_pb2_grpc.add_TransferServicer_to_server(service, around.server)
    puller = _puller(around, threads, on_verified)
    loop = asyncio.get_running_loop()
    for name, work in (("reaper", ledger.run_reaper()), ("sweeper", puller.sweep())):
        around.stack.callback(loop.create_task(work, name=name).cancel)
    return Transfers(ledger, puller, lending, Fetching(core, puller, send, around.worker_metrics))


def _puller(around: Surroundings, threads: Threads, on_verified: OnVerified | None) -> Puller:
    memory = around.built.memory
    puller = Puller(
        memory=memory,
        layout=around.built.layout,
        worker_id=around.record.id,
        connector=Connector(memory, threads, setting=around.config.transfer.transport, copier=block_copier(memory)),
        threads=threads,
        clock=MonotonicClock(),
        metrics=around.metrics,
        on_verified=on_verified,
    )
    around.stack.push_async_callback(puller.close)
    return puller


def _endpoints(around: Surroundings, permits: ReadPermits) -> list[Endpoint]:
    """The ways that `--transport` allows, best first."""
    allowed = transport_names(around.config.transfer.transport)
    endpoints = offer_memory(around.built.memory, allowed, around.stack.callback)
    if "tcp" in allowed:
        tcp = TcpServer(
            around.built.memory,
            permits,
            host=around.config.host,
            advertise_host=around.config.advertise_host,
            refusals=Refusals(around.metrics),
        )
        around.stack.callback(tcp.close)
        endpoints.append(tcp.endpoint())
    return endpoints
