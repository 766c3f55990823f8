"""A prompt's beginning that another worker holds: brought over before the rest is computed.

    router:  Submit(prefix) ─► AddRequest(num_fetch_blocks)
    engine:  Reserved ──► borrow, or the ticket that came along ──► landing ──► CommitPrefix ──► computes the rest
                          └─ fails: CommitPrefix(0), or DropPrefix while a writer is left; drained: FreeQuarantined

A fetch is a hint's worth: whatever goes wrong with it, the request goes on and computes what did not come; it waits
for a silent worker no longer than that is worth, which is less than the lease. Blocks are reserved before anything is
asked of the other worker, and its answer waits for no room there.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

from baton.errors import BatonError, RequestCancelled
from baton.ids import AttemptId
from baton.metrics import WorkerMetrics
from engine.messages import AddRequest, CommitPrefix, DropPrefix, FreeQuarantined, Reserved
from kvtransfer.destination import Puller
from kvtransfer.landing import Landed, Landing
from worker.core import WorkerCore
from worker.role import SendCommand
from worker.wire import PrefixSource, landed_event

log = logging.getLogger(__name__)

SILENCE_SECONDS = 3.0
"""A lender has all blocks from the start, so they come one behind the other, or it does not answer any more."""


@dataclass(slots=True)
class _Fetch:
    """Of one request, from its submission until its prefix is committed or let go."""

    source: PrefixSource
    task: asyncio.Task[None] | None = None
    landing: Landing | None = None
    cancelled: bool = False
    """The engine has been told to end the request, and quarantines what is reserved."""


class Fetching:
    def __init__(self, core: WorkerCore, puller: Puller, send: SendCommand, metrics: WorkerMetrics) -> None:
        self._core = core
        self._puller = puller
        self._send = send
        self._metrics = metrics
        self._fetches: dict[AttemptId, _Fetch] = {}

    def submit(self, request: AddRequest, source: PrefixSource | None) -> None:
        """To the engine, with the prefix to be fetched if there is one."""
        if source is not None and source.num_blocks:
            self._fetches[request.id] = _Fetch(source)
            request = replace(request, num_fetch_blocks=source.num_blocks)
        self._send(request)

    def cancel(self, request_id: AttemptId) -> None:
        """The engine is about to be told that the request ends here."""
        fetch = self._fetches.get(request_id)
        if fetch is None or fetch.cancelled:
            return
        fetch.cancelled = True
        if fetch.landing is not None:
            fetch.landing.cancel()

    def on_reserved(self, event: Reserved) -> None:
        fetch = self._fetches[event.id]
        if fetch.cancelled:
            self._send(FreeQuarantined(event.id))  # nobody has been asked for anything
        else:
            fetch.task = asyncio.create_task(self._run(fetch, event), name=f"fetch {event.id}")

    def on_settled(self, request_id: AttemptId) -> None:
        """The request computes, or has ended: one that was found cached was never fetched."""
        fetch = self._fetches.get(request_id)
        if fetch is not None and fetch.task is None:
            del self._fetches[request_id]

    def holds(self, request_id: AttemptId) -> bool:
        fetch = self._fetches.get(request_id)
        return fetch is not None and fetch.task is not None

    async def _run(self, fetch: _Fetch, event: Reserved) -> None:
        landed, end = None, 0
        try:
            landed, end = await self._bring(fetch, event)
        except BatonError as error:
            log.info("%s: its prefix is not fetched from %s: %s", event.id, fetch.source.worker_id, error.message)
        except Exception:
            log.exception("%s: the fetch of its prefix failed by a defect", event.id)
        outcome = "cancelled" if fetch.cancelled else "failed" if landed is None else "landed"
        self._metrics.prefix_fetches.labels(outcome=outcome).inc()
        landing = fetch.landing
        if fetch.cancelled or (landing is not None and landing.in_flight):
            if not fetch.cancelled:
                self._send(DropPrefix(event.id))
            if landing is not None:
                await landing.drained()
            self._send(FreeQuarantined(event.id))
        else:
            self._send(CommitPrefix(event.id, end, shareable=landed is None or landed.own_dtype))
            if landed is not None:
                self._core.tell(landed_event(event.id, landed))
        del self._fetches[event.id]
        self._core.let_go(event.id)

    async def _bring(self, fetch: _Fetch, event: Reserved) -> tuple[Landed, int]:
        """What landed, and up to which position. Raises BatonError."""
        source = fetch.source
        ticket = source.ticket or await self._puller.borrow(
            source.worker_id, source.address, source.incarnation, event.id, [block.hash for block in event.blocks]
        )
        blocks = event.blocks[: len(ticket.blocks)]
        first_missing = min(event.first_missing, len(blocks))
        if fetch.cancelled:  # meanwhile: all that is left to do is to release what was lent
            await self._puller.pull(ticket, ticket.id, blocks, len(blocks))
            raise RequestCancelled("its prefix is not wanted any more")
        fetch.landing = self._puller.land(ticket, ticket.id, blocks, first_missing)
        return await _patiently(fetch.landing), len(blocks)


async def _patiently(landing: Landing) -> Landed:
    """What landed. Gives the landing up when no block has come for a while. Raises BatonError."""
    while True:
        arrived = landing.arrived
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                return await landing.done()
        except TimeoutError:
            if landing.arrived == arrived:
                landing.cancel(f"no block has come for {SILENCE_SECONDS:g} s")
