"""`baton decode`: a worker with the role of admission.py."""

from __future__ import annotations

from baton.config import DecodeConfig
from decode_worker.admission import Admission
from discovery import WorkerRole
from kvtransfer.destination import OnVerified
from worker.core import WorkerCore
from worker.role import SendCommand
from worker.server import Surroundings, main
from worker.transfers import make_transfers


def serve(config: DecodeConfig) -> int:
    """Until SIGTERM. The exit status."""
    return main(WorkerRole.UNIFIED if config.unified else WorkerRole.DECODE, config, make_admission)


def make_admission(
    core: WorkerCore, send: SendCommand, around: Surroundings, on_verified: OnVerified | None = None
) -> Admission:
    """`on_verified` is for tests alone, as its own words say."""
    transfers = make_transfers(core, send, around, lambda request_id: admission.set_over(request_id), on_verified)
    admission = Admission(core, transfers.puller, transfers.lending, transfers.fetching, send)
    return admission
