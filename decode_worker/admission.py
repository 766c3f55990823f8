"""When may landed blocks be read? Ties the engine's reservations to landings.

    router:  Submit(RECEIVE) ─► parked, holding nothing ─► Handoff(ticket) ─► AddRequest, and the offer is kept alive
    engine:  Reserved ──► the landing claims, pulls and verifies ──► Commit ──► Tokens… ──► Ended
                          └─ fails: DropLanding ──► Ended(HANDOFF_FAILED); drained: FreeQuarantined

Blocks are reserved before anything is claimed, and only for a ticket, which a lease bounds: nothing is held here while
another worker is waited for without an end. While there is no room, the offer is kept alive; what takes the room are
streams that need no other worker, so they end, and no circle of waiting exists. A landing that fails is reported, never
repaired in silence: the router goes on with the request as a new attempt.

What a decode worker lends, and what it fetches before it computes a prompt itself, is like any worker's:
worker/lending.py, worker/fetching.py. A stream that is asked to move ends here, and its blocks are lent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass

from baton.errors import BatonError, HandoffFailed, RequestCancelled
from baton.ids import AttemptId
from baton.v1 import transfer_pb2, worker_pb2
from engine.messages import (
    Abort,
    AddRequest,
    Commit,
    DropLanding,
    Ended,
    EndReason,
    FreeQuarantined,
    Lent,
    MoveAway,
    Offered,
    RequestEvent,
    Reserved,
    Tokens,
)
from kvtransfer.destination import Puller
from kvtransfer.landing import Landing
from kvtransfer.reservation import Prompt
from kvtransfer.ticket import Ticket
from worker.core import WorkerCore
from worker.fetching import Fetching
from worker.lending import Lending
from worker.role import SendCommand
from worker.wire import PrefixSource, landed_event, ticket_event

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Arrival:
    """A request whose prompt is computed elsewhere, from Submit until its blocks are committed or let go."""

    request: AddRequest
    ticket: Ticket | None = None
    keeper: asyncio.Task[None] | None = None
    """Keeps the offer alive while the request waits for blocks of ours."""
    reserved: bool = False
    """Blocks of ours are kept for it."""
    landing: Landing | None = None
    aborted: bool = False
    """The engine has been told to end it, and quarantines what it may have reserved meanwhile."""
    moves: bool = False
    """It is to go on elsewhere once its blocks are committed."""


class Admission:
    """The role of a decode worker, and of a unified one."""

    tasks = frozenset({worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL})

    def __init__(
        self, core: WorkerCore, puller: Puller, lending: Lending, fetching: Fetching, send: SendCommand
    ) -> None:
        self._core = core
        self._puller = puller
        self._lending = lending
        self._fetching = fetching
        self._send = send
        self._arrivals: dict[AttemptId, _Arrival] = {}
        self._moving: dict[AttemptId, bool] = {}  # whether it has been cancelled since
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, task: worker_pb2.Task.ValueType, request: AddRequest, prefix: PrefixSource | None = None) -> None:
        if task == worker_pb2.TASK_LOCAL:
            self._fetching.submit(request, prefix)
        else:
            self._arrivals[request.id] = _Arrival(request)

    def handoff(self, request_id: AttemptId, ticket: transfer_pb2.Ticket) -> None:
        arrival = self._arrivals.get(request_id)
        if arrival is None or arrival.ticket is not None:
            return  # a repeat
        checked = Ticket.from_proto(ticket)
        if checked.num_tokens != len(arrival.request.token_ids):
            raise HandoffFailed(
                f"the ticket is for {checked.num_tokens} tokens, the request has {len(arrival.request.token_ids)}"
            )
        arrival.ticket = checked
        arrival.keeper = self._spawn(self._keep(request_id, checked))
        self._send(arrival.request)

    def cancel(self, request_id: AttemptId, reason: EndReason, message: str) -> None:
        arrival = self._arrivals.get(request_id)
        if arrival is None:
            self._fetching.cancel(request_id)
            self._send(Abort(request_id, reason, message))
            self._lending.abort(request_id)
            if request_id in self._moving:  # its offer may be on its way from the engine
                self._moving[request_id] = True
        elif arrival.landing is not None:
            self._give_up(arrival.landing, reason, message)
        elif arrival.ticket is not None:
            arrival.aborted = True
            self._send(Abort(request_id, reason, message))
        else:  # the engine has not heard of it
            del self._arrivals[request_id]
            self._core.end(request_id, reason, message)

    def move(self, request_id: AttemptId) -> None:
        arrival = self._arrivals.get(request_id)
        if arrival is not None:
            arrival.moves = True
        elif request_id not in self._moving:
            self._moving[request_id] = False
            self._fetching.cancel(request_id)
            self._send(MoveAway(request_id))

    def on_event(self, event: RequestEvent) -> None:
        arrival = self._arrivals.get(event.id)
        match event:
            case Lent():
                self._lending.on_lent(event)
            case Offered():
                self._offer_moved(event)
            case Reserved() if arrival is not None:
                self._receive(arrival, event)
            case Reserved():
                self._fetching.on_reserved(event)
            case Tokens():
                self._fetching.on_settled(event.id)
            case Ended():
                self._fetching.on_settled(event.id)
                self._moving.pop(event.id, None)
                if arrival is not None and arrival.landing is not None:
                    arrival.landing.cancel()  # and _follow lets go when nobody writes any more
                elif arrival is not None:
                    self._let_go(event.id)

    def holds(self, request_id: AttemptId) -> bool:
        return (
            request_id in self._arrivals or self._fetching.holds(request_id) or self._lending.holds(request_id)
        )  # fmt: skip

    async def drain(self, seconds: float) -> None:
        await self._lending.drain(seconds)

    def set_over(self, request_id: AttemptId) -> None:
        """A block set that was lent is in a terminal state and nobody reads its blocks."""
        if self._lending.set_over(request_id):
            self._core.let_go(request_id)

    def _offer_moved(self, event: Offered) -> None:
        ticket = self._lending.on_moved(event)
        self._core.tell(ticket_event(event.id, ticket))
        if self._moving.get(event.id):
            self._lending.abort(event.id)

    # --- offers

    async def _keep(self, request_id: AttemptId, ticket: Ticket) -> None:
        try:
            await self._puller.keep(ticket)
        except HandoffFailed as error:
            self.cancel(request_id, EndReason.HANDOFF_FAILED, error.message)

    def _stop_keeping(self, arrival: _Arrival) -> None:
        if arrival.keeper is not None:
            arrival.keeper.cancel()
            arrival.keeper = None

    # --- landings

    def _receive(self, arrival: _Arrival, event: Reserved) -> None:
        assert arrival.ticket is not None, "the engine hears of a request with its ticket"
        self._stop_keeping(arrival)
        arrival.reserved = True
        if arrival.aborted:
            return  # its end is on its way, and nobody has been asked for anything
        prompt = Prompt(arrival.request.token_ids, arrival.request.cache_salt)
        arrival.landing = self._puller.land(arrival.ticket, event.id, event.blocks, event.first_missing, prompt)
        self._spawn(self._follow(arrival.landing))

    async def _follow(self, landing: Landing) -> None:
        try:
            landed = await landing.done()
        except BatonError as error:
            if not isinstance(error, RequestCancelled):  # else whoever cancelled has said so
                log.warning("%s: %s", landing.id, error.message)
                self._give_up(landing, EndReason.HANDOFF_FAILED, error.message)
            await landing.drained()
            self._let_go(landing.id)
            return
        token = landed.first_token
        if token is None or token >= self._core.vocab_size:
            what = "gave no first token" if token is None else f"gave {token} as first token, which is not a token"
            message = f"the source {what}"
            self._give_up(landing, EndReason.HANDOFF_FAILED, message)
            self._let_go(landing.id)
            return
        moves = self._arrivals.pop(landing.id).moves
        self._send(Commit(landing.id, token, shareable=landed.own_dtype))
        self._core.tell(landed_event(landing.id, landed))
        if moves:
            self.move(landing.id)
        self._core.let_go(landing.id)  # it may have been cancelled in this very moment

    def _give_up(self, landing: Landing, reason: EndReason, message: str) -> None:
        landing.cancel()
        self._send(DropLanding(landing.id, landing.in_flight, reason, message))

    def _let_go(self, request_id: AttemptId) -> None:
        """Nobody writes the request's blocks any more."""
        arrival = self._arrivals.pop(request_id, None)
        if arrival is not None:
            self._stop_keeping(arrival)
            if arrival.reserved:
                self._send(FreeQuarantined(request_id))
            self._core.let_go(request_id)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return task
