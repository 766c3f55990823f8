"""Puts the destination's side of the handoff into a worker: the puller and its connections."""

from __future__ import annotations

import asyncio

from baton.clock import MonotonicClock
from baton.config import DecodeConfig
from decode_worker.admission import Admission
from discovery import WorkerRole
from kvtransfer.destination import OnVerified, Puller
from kvtransfer.threads import Threads
from kvtransfer.transports.chooser import Connector
from worker.copying import block_copier
from worker.core import WorkerCore
from worker.role import SendCommand
from worker.server import Surroundings, main


def serve(config: DecodeConfig) -> int:
    """Until SIGTERM. The exit status."""
    return main(WorkerRole.UNIFIED if config.unified else WorkerRole.DECODE, config, make_admission)


def make_admission(
    core: WorkerCore, send: SendCommand, around: Surroundings, on_verified: OnVerified | None = None
) -> Admission:
    """`on_verified` is for tests alone, as its own words say."""
    threads = Threads.create()
    around.stack.callback(threads.close)
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
    sweeper = asyncio.get_running_loop().create_task(puller.sweep(), name="sweeper")
    around.stack.callback(sweeper.cancel)
    return Admission(core, puller, send)
