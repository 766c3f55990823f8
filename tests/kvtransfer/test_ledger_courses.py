"""The source's ledger, whatever engine, pullers, readers and time do in whatever order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.ids import AttemptId, WorkerId
from kvtransfer.gate import Gate
from kvtransfer.lifetimes import SourceState
from kvtransfer.refusal import Refusal
from kvtransfer.source import Claimant
from kvtransfer.ticket import Ticket
from tests.kvtransfer.book import LEASE, Book, claim_of

T = TypeVar("T")


class LedgerMachine(RuleBasedStateMachine):
    """Any order of what engine, pullers, readers and time can do."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.tickets: list[Ticket] = []
        self.claimants: list[Claimant] = []
        self.inside: list[tuple[AttemptId, Gate]] = []

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def open(self) -> None:
        async def make() -> Book:
            return Book()

        self.book = self.do(make())
        self.clock_at_renewal: dict[AttemptId, float] = {}

    @rule(count=st.integers(1, 4))
    def offer(self, count: int) -> None:
        async def run() -> None:
            id = AttemptId("r", len(self.tickets))
            self.tickets.append(self.book.offer(count, id)[1])
            self.clock_at_renewal[id] = self.book.clock.now()

        self.do(run())

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), worker=st.sampled_from(["a", "b"]), first=st.integers(0, 5))
    def claim(self, data: st.DataObject, worker: str, first: int) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))

        async def run() -> None:
            try:
                self.claimants.append(self.book.ledger.claim(claim_of(ticket, first, WorkerId(worker))))
                self.clock_at_renewal[ticket.id] = self.book.clock.now()
            except Refusal:
                pass

        self.do(run())

    @precondition(lambda self: self.claimants)
    @rule(data=st.data(), release=st.booleans())
    def renew_or_release(self, data: st.DataObject, release: bool) -> None:
        claimant = data.draw(st.sampled_from(self.claimants))

        async def run() -> None:
            try:
                if release:
                    self.book.ledger.release(claimant)
                else:
                    self.book.ledger.renew(claimant)
                    self.clock_at_renewal[claimant.offered.ticket.id] = self.book.clock.now()
            except Refusal:
                pass

        self.do(run())

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), what=st.sampled_from(["seal", "prefilled", "abort"]))
    def engine(self, data: st.DataObject, what: str) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))

        async def run() -> None:
            match what:
                case "seal":
                    self.book.ledger.seal(ticket.id, data.draw(st.integers(0, len(ticket.blocks))))
                case "prefilled":
                    self.book.ledger.prefilled(ticket.id, 1)
                case "abort":
                    self.book.ledger.abort(ticket.id)

        self.do(run())

    @rule(seconds=st.sampled_from([0.1, 4.0, LEASE]))
    def time_passes(self, seconds: float) -> None:
        async def run() -> None:
            self.book.clock.advance(seconds)
            self.book.ledger.reap()

        self.do(run())

    @rule(data=st.data())
    def reader_enters(self, data: st.DataObject) -> None:
        permits = self.book.permits.snapshot()
        if permits:
            transfer_id = data.draw(st.sampled_from(sorted(permits)))
            ticket = next(t for t in self.tickets if t.transfer_id == transfer_id)
            assert permits[transfer_id].gate.enter()
            self.inside.append((ticket.id, permits[transfer_id].gate))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def reader_leaves(self, data: st.DataObject) -> None:
        _, gate = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))

        async def run() -> None:
            gate.leave()
            await asyncio.sleep(0)  # what the last one out says comes by way of the loop

        self.do(run())

    @invariant()
    def each_set_is_live_or_read_or_let_go_once(self) -> None:
        if not hasattr(self, "book"):
            return
        live, read = set(self.book.ledger.live()), {id for id, _ in self.inside}
        assert len(self.book.terminal) == len(set(self.book.terminal))
        for ticket in self.tickets:
            let_go = ticket.id in self.book.terminal
            assert let_go is (ticket.id not in live and ticket.id not in read)
        assert self.book.ledger.draining == len(read - live)
        now = self.book.clock.now()
        assert all(now < self.clock_at_renewal[id] + LEASE for id in live)

    @invariant()
    def the_metrics_say_the_same(self) -> None:
        if not hasattr(self, "book"):
            return
        sample = self.book.metrics.registry.get_sample_value
        counts = self.book.ledger.counts()
        for state in (SourceState.OFFERED, SourceState.CLAIMED):
            assert (sample("baton_kv_transfers", {"state": state.value}) or 0) == counts.get(state, 0)
        ended = Counter(
            {s: sample("baton_kv_transfers_ended_total", {"state": s}) or 0 for s in ("released", "expired", "aborted")}
        )
        assert ended.total() + sum(counts.values()) == len(self.tickets)

    def teardown(self) -> None:
        self.loop.close()


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


TestLedgerMachine = LedgerMachine.TestCase
