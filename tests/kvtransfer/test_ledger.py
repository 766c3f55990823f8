"""The source's ledger by a clock that stands still until it is moved."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.clock import ManualClock
from baton.errors import InternalError
from baton.ids import AttemptId, BlockRef, Incarnation, TransferId, WorkerId
from baton.metrics import Metrics, TransferMetrics
from kvtransfer.checksum import xxh3_checksum
from kvtransfer.gate import Gate, ReadPermits
from kvtransfer.lifetimes import SourceState
from kvtransfer.memory import HostMemory
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.source import Claimant, ClaimRequest, Prefilled, SourceLedger
from kvtransfer.ticket import Ticket
from tests.kvtransfer.rig import INCARNATION, LAYOUT, PULLER_ID, SOURCE_ID, fill, make_pool, pattern, take

T = TypeVar("T")
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


def kept(book: Book, ticket: Ticket) -> bool:
    try:
        book.ledger.keep(ticket.transfer_id, ticket.incarnation)
    except Refusal:
        return False
    return True


def claim_of(ticket: Ticket, first_block: int = 0, worker_id: WorkerId = PULLER_ID) -> ClaimRequest:
    return ClaimRequest(ticket.transfer_id, ticket.incarnation, ticket.id, ticket.layout, first_block, worker_id)


@pytest.fixture
async def book() -> Any:
    made = Book()
    yield made
    made.executor.shutdown()


async def test_an_offer_that_is_kept_outlives_its_lease_and_no_longer(book: Book) -> None:
    _, ticket = book.offer()
    for _ in range(3):
        book.clock.advance(LEASE * 0.9)
        assert kept(book, ticket)
        book.ledger.reap()
    assert book.ledger.counts() == {SourceState.OFFERED: 1}
    book.clock.advance(LEASE)
    assert not kept(book, ticket)
    assert book.terminal == [ticket.id]


async def test_keeping_renews_no_claim_and_no_strangers_offer(book: Book) -> None:
    _, ticket = book.offer()
    stranger = replace(ticket, incarnation=Incarnation(ticket.incarnation + 2))
    assert not kept(book, stranger)
    assert not kept(book, replace(ticket, transfer_id=TransferId(bytes(16))))
    book.ledger.claim(claim_of(ticket))
    book.clock.advance(LEASE * 0.9)
    assert kept(book, ticket)
    book.clock.advance(LEASE * 0.2)
    book.ledger.reap()
    assert book.terminal == [ticket.id], "the claimant did not renew"


async def test_an_offer_that_nobody_claims_expires_by_the_holders_own_clock(book: Book) -> None:
    _, ticket = book.offer()
    book.clock.advance(LEASE - 0.001)
    book.ledger.reap()
    assert book.ledger.live() == (ID,)
    book.clock.advance(0.001)
    book.ledger.reap()
    book.ledger.reap()
    assert book.ledger.live() == ()
    assert book.terminal == [ID]
    assert book.refused(claim_of(ticket)).reason is RefusalReason.EXPIRED


async def test_a_claim_that_comes_after_the_deadline_and_before_the_reaper_expires_the_offer(book: Book) -> None:
    _, ticket = book.offer()
    book.clock.advance(LEASE)
    with pytest.raises(Refusal, match="lease of the block set ran out"):
        book.ledger.claim(claim_of(ticket))
    assert book.terminal == [ID]


async def test_renewals_keep_a_claim_and_nothing_else_does(book: Book) -> None:
    _, ticket = book.offer()
    claimant = book.ledger.claim(claim_of(ticket))
    for _ in range(5):
        book.clock.advance(LEASE - 1)
        book.ledger.reap()
        book.ledger.renew(claimant)
    book.ledger.seal(ID, 4)
    book.ledger.prefilled(ID, 7)
    assert isinstance(await book.ledger.announcement(claimant), list)
    book.clock.advance(LEASE)
    book.ledger.reap()
    assert book.terminal == [ID]
    with pytest.raises(Refusal, match="lease of the block set ran out"):
        book.ledger.renew(claimant)
    with pytest.raises(Refusal, match="lease of the block set ran out"):
        book.ledger.release(claimant)


async def test_the_reaper_runs_by_itself(book: Book) -> None:
    book.offer()
    book.ledger.lease_seconds = 0.004  # how often it looks
    reaper = asyncio.create_task(book.ledger.run_reaper())
    book.clock.advance(LEASE)
    assert await book.ledger.drain(5)
    assert book.terminal == [ID]
    reaper.cancel()


async def test_time_for_which_the_worker_itself_was_held_up_ends_no_set(book: Book) -> None:
    """What the puller said meanwhile is still to be heard."""
    _, ticket = book.offer()
    book.ledger.lease_seconds = 0.004  # how often it looks
    reaper = asyncio.create_task(book.ledger.run_reaper())
    await asyncio.sleep(0)
    book.clock.advance(LEASE)  # in one pause of the reaper
    await asyncio.sleep(0.05)
    reaper.cancel()
    assert kept(book, ticket)
    book.clock.advance(LEASE)
    book.ledger.reap()
    assert book.terminal == [ID]


async def test_a_reaper_outlives_a_listener_that_fails(book: Book, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[AttemptId] = []

    def fail(id: AttemptId) -> None:
        calls.append(id)
        raise RuntimeError("listener")

    book.ledger._on_terminal = fail
    book.ledger.lease_seconds = 0.004
    book.offer()
    book.ledger.offer(AttemptId("req-2", 0), take(book.memory, [40]), 16)
    reaper = asyncio.create_task(book.ledger.run_reaper())
    book.clock.advance(LEASE)
    assert await book.ledger.drain(5)
    assert sorted(calls) == [ID, AttemptId("req-2", 0)]
    assert "goes on with the others" in caplog.text
    reaper.cancel()


async def test_tombstones_tell_a_late_claim_what_became_of_the_set(book: Book) -> None:
    _, released = book.offer()
    book.ledger.release(book.ledger.claim(claim_of(released)))
    assert book.refused(claim_of(released)).message == "the block set was released"
    _, aborted = book.offer()
    book.ledger.abort(ID)
    assert book.refused(claim_of(aborted)).reason is RefusalReason.ABORTED
    stranger = replace(claim_of(aborted), transfer_id=TransferId(bytes(16)))
    assert book.refused(stranger).reason is RefusalReason.UNKNOWN_TRANSFER


async def test_tombstones_are_bounded(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.source._MAX_TOMBSTONES", 3)
    tickets = []
    for attempt in range(5):
        tickets.append(book.offer(1, AttemptId("r", attempt))[1])
        book.ledger.abort(AttemptId("r", attempt))
    reasons = [book.refused(claim_of(ticket)).reason for ticket in tickets]
    assert reasons == [RefusalReason.UNKNOWN_TRANSFER] * 2 + [RefusalReason.ABORTED] * 3


async def test_a_ticket_from_before_a_restart_is_refused_with_both_incarnations(book: Book) -> None:
    _, ticket = book.offer()
    refusal = book.refused(replace(claim_of(ticket), incarnation=Incarnation(12)))
    assert refusal.reason is RefusalReason.STALE_INCARNATION
    assert "incarnation 12, this is 77 of prefill-0" in refusal.message


async def test_a_layout_that_cannot_be_matched_is_refused_with_both_values(book: Book) -> None:
    _, ticket = book.offer()
    other = replace(LAYOUT, num_layers=28, model_fingerprint=b"\xab" * 16)
    refusal = book.refused(replace(claim_of(ticket), layout=other))
    assert refusal.reason is RefusalReason.LAYOUT_MISMATCH
    assert refusal.message == (
        "decode-0 can't use the blocks of prefill-0: the model's fingerprint is 6d6d6d6d6d6d6d6d at the source, "
        "abababababababab at the destination; the number of layers is 2 at the source, 28 at the destination"
    )


@pytest.mark.parametrize("changes", [{"block_size": 8}, {"dtype": "bfloat16"}, {"tp_size": 2, "tp_rank": 1}])
async def test_a_layout_that_the_puller_can_re_lay_is_let_in(book: Book, changes: dict[str, Any]) -> None:
    _, ticket = book.offer()
    book.ledger.claim(replace(claim_of(ticket), layout=replace(LAYOUT, **changes)))
    assert book.ledger.counts() == {SourceState.CLAIMED: 1}


async def test_a_claim_must_name_the_offers_attempt(book: Book) -> None:
    _, ticket = book.offer()
    refusal = book.refused(replace(claim_of(ticket), id=AttemptId("req-1", 1)))
    assert refusal.reason is RefusalReason.UNKNOWN_TRANSFER
    assert "req-1#1" in refusal.message
    assert "req-1#0" in refusal.message


async def test_a_claim_from_beyond_the_last_block_is_malformed(book: Book) -> None:
    _, ticket = book.offer(4)
    assert book.refused(claim_of(ticket, 5)).reason is RefusalReason.MALFORMED
    book.ledger.claim(claim_of(ticket, 4))


async def test_a_second_worker_cannot_claim_and_the_same_one_takes_over(book: Book) -> None:
    _, ticket = book.offer()
    first = book.ledger.claim(claim_of(ticket))
    refusal = book.refused(claim_of(ticket, worker_id=WorkerId("decode-9")))
    assert refusal.reason is RefusalReason.ALREADY_CLAIMED
    assert "decode-0 pulls" in refusal.message
    second = book.ledger.claim(claim_of(ticket))
    with pytest.raises(Refusal, match="later claim"):
        book.ledger.renew(first)
    with pytest.raises(Refusal, match="later claim"):
        book.ledger.release(first)
    book.ledger.release(second)
    assert book.terminal == [ID]


async def test_blocks_are_announced_in_order_with_their_checksums_then_the_token(book: Book) -> None:
    blocks, ticket = book.offer(5)
    claimant = book.ledger.claim(claim_of(ticket, 1))
    sums = [xxh3_checksum(pattern(b.index, b.generation)) for b in blocks]
    waiting = asyncio.create_task(book.ledger.announcement(claimant))
    book.ledger.seal(ID, 3)
    assert await waiting == [(1, sums[1]), (2, sums[2])]
    book.ledger.seal(ID, 3)
    book.ledger.seal(ID, 2)  # a repeat, and one that came late
    book.ledger.prefilled(ID, 99)
    assert await book.ledger.announcement(claimant) == [(3, sums[3]), (4, sums[4])]
    assert await book.ledger.announcement(claimant) == Prefilled(99)
    assert await book.ledger.announcement(claimant) is None


async def test_nothing_is_summed_that_nobody_wants(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []

    def count(memory: HostMemory, indices: list[int]) -> list[int]:
        summed.extend(indices)
        return [0] * len(indices)

    monkeypatch.setattr(HostMemory, "checksums", count)
    _, ticket = book.offer(5)
    book.ledger.prefilled(ID, 1)
    claimant = book.ledger.claim(claim_of(ticket, 3))
    await book.ledger.announcement(claimant)
    again = book.ledger.claim(claim_of(ticket, 2))  # after the stream broke
    assert await book.ledger.announcement(again) == [(2, 0), (3, 0), (4, 0)]
    assert summed == [8, 9, 7]


async def test_an_announcement_ends_with_the_set(book: Book) -> None:
    _, ticket = book.offer()
    claimant = book.ledger.claim(claim_of(ticket))
    waiting = asyncio.create_task(book.ledger.announcement(claimant))
    await asyncio.sleep(0)
    book.ledger.abort(ID)
    with pytest.raises(Refusal, match="gave the request up"):
        await waiting


async def test_abort_during_a_pull_keeps_the_source_blocks_until_the_last_reader_is_out(book: Book) -> None:
    _, ticket = book.offer()
    book.ledger.claim(claim_of(ticket))
    permit = book.permits.get(ticket.transfer_id)
    assert permit is not None
    assert permit.gate.enter()
    assert permit.gate.enter()
    book.ledger.abort(ID)
    book.ledger.abort(ID)
    assert book.permits.get(ticket.transfer_id) is None
    assert (book.ledger.live(), book.ledger.draining, book.terminal) == ((), 1, [])
    assert not await book.ledger.drain(0.01)
    permit.gate.leave()
    threading.Thread(target=permit.gate.leave).start()
    assert await book.ledger.drain(5)
    assert (book.ledger.draining, book.terminal) == (0, [ID])


async def test_abort_waits_for_a_checksum_under_way(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(memory: HostMemory, indices: list[int]) -> list[int]:
        reading.set()
        assert go_on.wait(5)
        return [0] * len(indices)

    monkeypatch.setattr(HostMemory, "checksums", slow)
    _, ticket = book.offer()
    claimant = book.ledger.claim(claim_of(ticket))
    book.ledger.seal(ID, 4)
    announcing = asyncio.create_task(book.ledger.announcement(claimant))
    await asyncio.to_thread(reading.wait, 5)
    book.ledger.abort(ID)
    announcing.cancel()  # its stream ended, the thread did not
    assert book.terminal == []
    go_on.set()
    assert await book.ledger.drain(5)
    assert book.terminal == [ID]


async def test_what_comes_late_for_an_ended_attempt_changes_nothing(book: Book) -> None:
    book.offer()
    book.ledger.abort(ID)
    book.ledger.seal(ID, 4)
    book.ledger.prefilled(ID, 3)
    book.ledger.abort(ID)
    assert book.terminal == [ID]


async def test_defects_of_the_caller_are_told(book: Book) -> None:
    blocks, _ = book.offer()
    with pytest.raises(InternalError, match="has offered its blocks already"):
        book.ledger.offer(ID, blocks, 64)
    with pytest.raises(InternalError, match="0 blocks with 0 tokens"):
        book.ledger.offer(AttemptId("r", 1), [], 0)
    with pytest.raises(InternalError, match="sealed 5 of 4 blocks"):
        book.ledger.seal(ID, 5)


async def test_an_abort_storm_ends_as_fast_as_it_came(book: Book) -> None:
    """Ends cost the same however many sets are live."""
    ids = [AttemptId("storm", attempt) for attempt in range(5000)]
    for id in ids:
        book.ledger.offer(id, take(book.memory, [3]), 16)
    for id in ids:
        book.ledger.abort(id)
    assert book.terminal == ids
    assert await book.ledger.drain(0.01)


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
