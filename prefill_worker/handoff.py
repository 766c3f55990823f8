"""When may source blocks die? Ties the engine's offers to the ledger of live transfers.

    engine:  Offered ──► Sealed… ──► Tokens ──► Ended(PREFILLED)
    ledger:  offer   ──► seal…   ──► prefilled            (claimed, renewed, released by the decode worker)
    router:  ticket                   first token   end
    engine:  ReleaseOffer ◄── the set is in a terminal state and nobody reads it

The engine keeps the blocks from Offered until ReleaseOffer, whatever becomes of the request in between. Where the first
token ends the answer they stay offered all the same: else their puller is refused, maybe before the router has heard.
What a prefill worker lends, and what it fetches before it computes, is like any worker's: worker/lending.py,
worker/fetching.py.
"""

from __future__ import annotations

from baton.errors import InvalidRequest
from baton.ids import AttemptId
from baton.v1 import transfer_pb2, worker_pb2
from engine.messages import (
    Abort,
    AddRequest,
    Ended,
    EndReason,
    Lent,
    Offered,
    ReleaseOffer,
    RequestEvent,
    Reserved,
    Sealed,
    Tokens,
)
from kvtransfer.source import SourceLedger
from worker.core import WorkerCore
from worker.fetching import Fetching
from worker.lending import Lending
from worker.role import SendCommand
from worker.wire import PrefixSource, ticket_event

_COMPUTED = (EndReason.PREFILLED, EndReason.STOP, EndReason.LENGTH)


class Handoff:
    """The role of a prefill worker."""

    tasks = frozenset({worker_pb2.TASK_PREFILL})

    def __init__(
        self, core: WorkerCore, ledger: SourceLedger, lending: Lending, fetching: Fetching, send: SendCommand
    ) -> None:
        """`ledger` is to call `set_over` when a set has ended."""
        self._core = core
        self._ledger = ledger
        self._lending = lending
        self._fetching = fetching
        self._send = send
        self._offered: set[AttemptId] = set()
        self._cancelled: dict[AttemptId, bool] = {}  # of each attempt that the engine has not ended yet

    def submit(self, task: worker_pb2.Task.ValueType, request: AddRequest, prefix: PrefixSource | None = None) -> None:
        self._cancelled[request.id] = False
        self._fetching.submit(request, prefix)

    def handoff(self, request_id: AttemptId, ticket: transfer_pb2.Ticket) -> None:
        raise InvalidRequest("a prefill worker hands out tickets and takes none")

    def cancel(self, request_id: AttemptId, reason: EndReason, message: str) -> None:
        self._fetching.cancel(request_id)
        self._send(Abort(request_id, reason, message))
        self._ledger.abort(request_id)
        if request_id in self._cancelled:  # its offer, and even its good end, may be on their way from the engine
            self._cancelled[request_id] = True

    def move(self, request_id: AttemptId) -> None:
        """A prompt that is being computed goes nowhere: it soon is done."""

    def on_event(self, event: RequestEvent) -> None:
        match event:
            case Reserved():
                self._fetching.on_reserved(event)
            case Lent():
                self._lending.on_lent(event)
            case Offered():
                self._fetching.on_settled(event.id)
                ticket = self._ledger.offer(event.id, event.blocks, event.num_tokens)
                self._offered.add(event.id)
                self._core.tell(ticket_event(event.id, ticket))
            case Sealed():
                self._ledger.seal(event.id, event.end)
            case Tokens():
                self._ledger.prefilled(event.id, event.token_ids[-1])
            case Ended():
                self._fetching.on_settled(event.id)
                cancelled = self._cancelled.pop(event.id, False)
                if cancelled or event.reason not in _COMPUTED:
                    self._ledger.abort(event.id)

    def holds(self, request_id: AttemptId) -> bool:
        return request_id in self._offered or self._fetching.holds(request_id)

    async def drain(self, seconds: float) -> None:
        await self._lending.drain(seconds)

    def set_over(self, request_id: AttemptId) -> None:
        """The block set is in a terminal state and nobody reads its blocks."""
        if self._lending.set_over(request_id):
            return
        self._offered.discard(request_id)
        self._send(ReleaseOffer(request_id))
        self._core.let_go(request_id)
