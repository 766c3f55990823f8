"""Puts the source's side of the handoff into a worker: the ledger, its reaper, and the ways to the blocks' bytes."""

from __future__ import annotations

import asyncio

from baton.clock import MonotonicClock
from baton.config import WorkerConfig
from baton.v1 import transfer_pb2_grpc
from discovery import WorkerRole
from kvtransfer.gate import ReadPermits
from kvtransfer.refusal import Refusals
from kvtransfer.service import TransferService
from kvtransfer.source import SourceLedger
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.chooser import offers_shm, transport_names
from kvtransfer.transports.shm import shm_endpoint
from kvtransfer.transports.tcp_server import TcpServer
from prefill_worker.handoff import Handoff
from worker.core import WorkerCore
from worker.role import SendCommand
from worker.server import Surroundings, main


def serve(config: WorkerConfig) -> int:
    """Until SIGTERM. The exit status."""
    return main(WorkerRole.PREFILL, config, make_handoff)


def make_handoff(core: WorkerCore, send: SendCommand, around: Surroundings) -> Handoff:
    permits = ReadPermits()
    threads = Threads.create()
    around.stack.callback(threads.close)
    ledger = SourceLedger(
        memory=around.built.memory,
        layout=around.built.layout,
        worker_id=around.record.id,
        address=around.record.address,
        incarnation=around.record.incarnation,
        lease_seconds=around.config.transfer.lease_seconds,
        on_terminal=lambda request_id: handoff.set_over(request_id),
        clock=MonotonicClock(),
        metrics=around.metrics,
        executor=threads.memory,
        permits=permits,
    )
    handoff = Handoff(core, ledger, send)
    endpoints = _endpoints(around, permits)
    service = TransferService(ledger, lambda: endpoints, around.metrics)
    transfer_pb2_grpc.add_TransferServicer_to_server(service, around.server)
    reaper = asyncio.get_running_loop().create_task(ledger.run_reaper(), name="reaper")
    around.stack.callback(reaper.cancel)
    return handoff


def _endpoints(around: Surroundings, permits: ReadPermits) -> list[Endpoint]:
    """The ways that `--transport` allows, best first."""
    allowed = transport_names(around.config.transfer.transport)
    endpoints: list[Endpoint] = []
    shared = offers_shm(around.built.memory)
    if "shm" in allowed and shared is not None:
        endpoints.append(shm_endpoint(shared))
    if "tcp" in allowed:
        host = around.config.host
        tcp = TcpServer(
            around.built.memory,
            permits,
            host=host,
            advertise_host=around.config.advertise_host,
            refusals=Refusals(around.metrics),
        )
        around.stack.callback(tcp.close)
        endpoints.append(tcp.endpoint())
    return endpoints
