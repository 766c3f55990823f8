"""Blocks that others may read although nobody prefilled them for them: when may these die?

    peer:    Lend(hashes)                     router:  Move
    engine:  Lend ──► Lent                    engine:  MoveAway ──► Offered ──► Ended(MOVED)
    ledger:           offer, all sealed       ledger:               offer, all sealed
    peer:             ticket, then claim …    router:               ticket, for the worker that goes on
    engine:  ReleaseOffer ◄── the set is in a terminal state and nobody reads it

What is lent is held for the lease that the ledger keeps, and for nothing else. Lending never waits for room, and
whoever borrows has reserved its own blocks before it asks: no two workers wait for one another.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from baton.ids import AttemptId, BlockRef
from engine.messages import Lend, Lent, Offered, ReleaseOffer
from kvtransfer.lend import LendRequest
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.source import SourceLedger
from kvtransfer.ticket import Ticket
from worker.role import SendCommand

ANSWER_SECONDS = 2.0
"""In which the engine says what it has: a step, or two."""
MAX_LENT = 256
"""Block sets at once: whoever asks for more is told that nothing is here."""


class Lending:
    def __init__(self, ledger: SourceLedger, send: SendCommand) -> None:
        """`ledger` is to tell of every set that ends, which `set_over` then hears."""
        self._ledger = ledger
        self._send = send
        self._asked: dict[AttemptId, asyncio.Future[Ticket | None]] = {}
        self._all_told = asyncio.Event()
        """The engine has answered all that it was asked."""
        self._all_told.set()
        self._held: set[AttemptId] = set()
        self._closed = False

    async def lend(self, request: LendRequest) -> Ticket:
        """For the peer that asks. A repeat gets the same ticket. Raises Refusal."""
        self._ledger.check_borrower(request.incarnation, request.layout_fingerprint)
        known = self._ledger.ticket(request.id) if request.id in self._held else None
        ticket = known or await self._ask_engine(request)
        if ticket is None:
            raise Refusal(RefusalReason.NOT_HELD, f"{self._ledger.worker_id} has none of these blocks (any more)")
        return ticket

    async def _ask_engine(self, request: LendRequest) -> Ticket | None:
        if self._closed or len(self._held) + len(self._asked) >= MAX_LENT:
            return None
        answer = self._asked.get(request.id)
        if answer is None:
            answer = self._asked[request.id] = asyncio.get_running_loop().create_future()
            self._all_told.clear()
            self._send(Lend(request.id, request.hashes))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.shield(answer)
        except TimeoutError:
            answer.cancel()
            return None
        except asyncio.CancelledError:
            if answer.cancelled():
                return None  # another who asked for the same has gone
            if not answer.cancel():
                self.abort(request.id)  # it was offered in this very moment
            raise

    def on_lent(self, event: Lent) -> None:
        answer = self._asked.pop(event.id)
        if not self._asked:
            self._all_told.set()
        ticket = self._offer(event.id, event.blocks) if event.blocks else None
        if not answer.done():
            answer.set_result(ticket)
        else:
            self.abort(event.id)  # nobody waits for it any more

    def on_moved(self, event: Offered) -> Ticket:
        """A stream goes on elsewhere: what it has computed is there for whoever takes it on."""
        return self._offer(event.id, event.blocks)

    def abort(self, request_id: AttemptId) -> None:
        """Nobody will come. Repeats, and what was never lent, do nothing."""
        if request_id in self._held:
            self._ledger.abort(request_id)

    def holds(self, request_id: AttemptId) -> bool:
        return request_id in self._held

    def set_over(self, request_id: AttemptId) -> bool:
        """The set is in a terminal state and nobody reads its blocks. False: it is not one that was lent."""
        if request_id not in self._held:
            return False
        self._held.discard(request_id)
        self._send(ReleaseOffer(request_id))
        return True

    async def drain(self, seconds: float) -> None:
        """Lends no more, and waits until nobody reads what this worker has offered, or is offering just now."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all_told.wait()
                await self._ledger.drain(seconds)

    def _offer(self, request_id: AttemptId, blocks: Sequence[BlockRef]) -> Ticket:
        ticket = self._ledger.offer(request_id, blocks, len(blocks) * self._ledger.layout.block_size)
        self._held.add(request_id)
        self._ledger.prefilled(request_id, None)
        return ticket
