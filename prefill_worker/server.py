"""`baton prefill`: a worker with the role of handoff.py."""

from __future__ import annotations

from baton.config import WorkerConfig
from discovery import WorkerRole
from prefill_worker.handoff import Handoff
from worker.core import WorkerCore
from worker.role import SendCommand
from worker.server import Surroundings, main
from worker.transfers import make_transfers


def serve(config: WorkerConfig) -> int:
    """Until SIGTERM. The exit status."""
    return main(WorkerRole.PREFILL, config, make_handoff)


def make_handoff(core: WorkerCore, send: SendCommand, around: Surroundings) -> Handoff:
    transfers = make_transfers(core, send, around, lambda request_id: handoff.set_over(request_id))
    handoff = Handoff(core, transfers.ledger, transfers.lending, transfers.fetching, send)
    return handoff
