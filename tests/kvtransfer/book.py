"""A source's ledger by a clock that stands still until it is moved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.clock import ManualClock
from baton.ids import AttemptId, BlockRef, WorkerId
from baton.metrics import Metrics, TransferMetrics
from kvtransfer.gate import ReadPermits
from kvtransfer.refusal import Refusal
from kvtransfer.source import ClaimRequest, SourceLedger
from kvtransfer.ticket import Ticket
from tests.kvtransfer.rig import INCARNATION, LAYOUT, PULLER_ID, SOURCE_ID, fill, make_pool, take

LEASE = 10.0
ID = AttemptId("req-1", 0)


class Book:
    """A ledger and what it needs."""

    def __init__(self) -> None:
        self.memory = make_pool()
        self.clock = ManualClock(100.0)
        self.metrics = Metrics()
        self.permits = ReadPermits()
        self.terminal: list[AttemptId] = []
        self.executor = ThreadPoolExecutor(1)
        self.ledger = SourceLedger(
            memory=self.memory,
            layout=LAYOUT,
            worker_id=SOURCE_ID,
            address="127.0.0.1:1",
            incarnation=INCARNATION,
            lease_seconds=LEASE,
            on_terminal=self.terminal.append,
            clock=self.clock,
            metrics=TransferMetrics(self.metrics),
            executor=self.executor,
            permits=self.permits,
        )

    def offer(self, count: int = 4, id: AttemptId = ID) -> tuple[list[BlockRef], Ticket]:
        blocks = take(self.memory, range(5, 5 + count))
        fill(self.memory, blocks)
        return blocks, self.ledger.offer(id, blocks, 16 * count)

    def refused(self, request: ClaimRequest) -> Refusal:
        before = self.ledger.counts(), list(self.terminal)
        with pytest.raises(Refusal) as caught:
            self.ledger.claim(request)
        assert (self.ledger.counts(), self.terminal) == before
        return caught.value


def claim_of(ticket: Ticket, first_block: int = 0, worker_id: WorkerId = PULLER_ID) -> ClaimRequest:
    return ClaimRequest(ticket.transfer_id, ticket.incarnation, ticket.id, ticket.layout, first_block, worker_id)
