"""The source's ledger by a clock that stands still until it is moved."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from baton.errors import InternalError
from baton.ids import AttemptId, Incarnation, TransferId, WorkerId
from kvtransfer.checksum import xxh3_checksum
from kvtransfer.lifetimes import SourceState
from kvtransfer.memory import HostMemory
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.source import Prefilled
from kvtransfer.ticket import Ticket
from tests.kvtransfer.book import ID, LEASE, Book, claim_of
from tests.kvtransfer.rig import LAYOUT, pattern, take


@pytest.fixture
async def book() -> Any:
    made = Book()
    yield made
    made.executor.shutdown()


def kept(book: Book, ticket: Ticket) -> bool:
    try:
        book.ledger.keep(ticket.transfer_id, ticket.incarnation)
    except Refusal:
        return False
    return True


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
