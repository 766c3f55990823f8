"""The ledger of a source: every block set that this worker offers, from the ticket to the one terminal state.

Owned by the event loop; no other thread calls it. It decides when a set ends and says so once, when nobody of this
process touches the set's bytes any more. It never frees a block, never reads the network, and never asks the
scheduler: deadlines are kept by its own clock and its own task, so that a full pool cannot keep them from running out.

A puller with shared memory reads on its own. Should it still read when the set has ended, it finds another
generation or another checksum, and drops what it read: a read can't hurt the blocks' next user.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from baton.clock import Clock
from baton.errors import InternalError
from baton.ids import AttemptId, BlockRef, Incarnation, TransferId, WorkerId, new_transfer_id
from baton.layout import KVLayout, mismatch
from baton.metrics import TransferMetrics
from kvtransfer.checksum import ChecksumKind
from kvtransfer.counting import count_state
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.lifetimes import SOURCE, Lifetime, SourceState
from kvtransfer.memory import PoolMemory
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.ticket import MAX_BLOCKS, Ticket

log = logging.getLogger(__name__)

CHECKSUM_BATCH_BYTES = {ChecksumKind.XXH3: 16 << 20, ChecksumKind.NH: 128 << 20}
"""Announced together at most: a puller can begin with these while the next are summed. A device sums so many in less
time than it takes to ask it."""
_MAX_TOMBSTONES = 4096
_MAX_REAP_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A claim as it is checked: see `Claim` in transfer.proto."""

    transfer_id: TransferId = field(repr=False)
    incarnation: int
    id: AttemptId
    layout: KVLayout
    first_block: int
    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class Prefilled:
    """All of a set's blocks are sealed."""

    first_token: int | None
    """Sampled behind the prompt; None where nobody computed it for the puller."""


class Claimant:
    """One stream of one puller on one set. A later claim by the same puller takes its place."""

    def __init__(self, offered: _Offered, first_block: int, worker_id: WorkerId) -> None:
        self.offered = offered
        self.worker_id = worker_id
        self.next_position = first_block
        """The first block that has not been announced on this stream."""
        self.told_all = False


class _Offered:
    """One set."""

    def __init__(self, ticket: Ticket, lifetime: Lifetime[SourceState], deadline: float) -> None:
        self.ticket = ticket
        self.lifetime = lifetime
        self.deadline = deadline
        self.gate = Gate()
        self.permit = ReadPermit(self.gate)
        self.sealed_end = 0
        self.checksums: dict[int, int] = {}
        self.prefilled: Prefilled | None = None
        self.claimant: Claimant | None = None
        self.claimed_by: WorkerId | None = None
        self.changed = asyncio.Event()


_REFUSALS = {
    SourceState.RELEASED: (RefusalReason.UNKNOWN_TRANSFER, "the block set was released"),
    SourceState.EXPIRED: (RefusalReason.EXPIRED, "the lease of the block set ran out"),
    SourceState.ABORTED: (RefusalReason.ABORTED, "the source gave the request up"),
}


class SourceLedger:
    def __init__(
        self,
        *,
        memory: PoolMemory,
        layout: KVLayout,
        worker_id: WorkerId,
        address: str,
        incarnation: Incarnation,
        lease_seconds: float,
        on_terminal: Callable[[AttemptId], None],
        clock: Clock,
        metrics: TransferMetrics,
        executor: Executor,
        permits: ReadPermits,
    ) -> None:
        """`on_terminal` is called on the event loop, exactly once a set. `permits` is what byte servers read."""
        self.layout = layout
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.lease_seconds = lease_seconds
        self._memory = memory
        self._address = address
        self._on_terminal = on_terminal
        self._clock = clock
        self._executor = executor
        self._permits = permits
        self._sets: dict[TransferId, _Offered] = {}
        self._by_attempt: dict[AttemptId, _Offered] = {}
        self._tombstones: OrderedDict[TransferId, SourceState] = OrderedDict()
        self._draining = 0  # ended sets with I/O in flight
        self._count = partial(count_state, metrics)
        self._idle = asyncio.Event()
        self._idle.set()
        self._batch = max(1, CHECKSUM_BATCH_BYTES[memory.checksum_kind] // memory.block_bytes)

    # --- the engine's side

    def offer(self, id: AttemptId, blocks: Sequence[BlockRef], num_tokens: int) -> Ticket:
        """Opens a set of blocks that are to be filled. Raises InternalError where the attempt has one already."""
        if id in self._by_attempt:
            raise InternalError(f"{id} has offered its blocks already")
        if not 0 < len(blocks) <= MAX_BLOCKS or num_tokens < len(blocks):
            raise InternalError(f"{len(blocks)} blocks with {num_tokens} tokens can't be offered")
        ticket = Ticket(
            transfer_id=new_transfer_id(),
            worker_id=self.worker_id,
            address=self._address,
            incarnation=self.incarnation,
            layout=self.layout,
            blocks=tuple(blocks),
            lease_seconds=self.lease_seconds,
            num_tokens=num_tokens,
            id=id,
            checksum_kind=self._memory.checksum_kind,
        )
        offered = _Offered(ticket, Lifetime(SOURCE, SourceState.OFFERED, self._count), self._new_deadline())
        self._sets[ticket.transfer_id] = self._by_attempt[id] = offered
        self._idle.clear()
        return ticket

    def seal(self, id: AttemptId, end: int) -> None:
        """The blocks before position `end` won't change any more. For an attempt that has ended, does nothing."""
        offered = self._by_attempt.get(id)
        if offered is None or end <= offered.sealed_end:
            return
        if end > len(offered.ticket.blocks):
            raise InternalError(f"{id} sealed {end} of {len(offered.ticket.blocks)} blocks")
        for block in offered.ticket.blocks[offered.sealed_end : end]:
            offered.permit.allow(block.index, block.generation)
        offered.sealed_end = end
        offered.changed.set()

    def prefilled(self, id: AttemptId, first_token: int | None) -> None:
        """All is sealed, and the next token is known, if there is one. For an attempt that has ended, does nothing."""
        offered = self._by_attempt.get(id)
        if offered is None:
            return
        self.seal(id, len(offered.ticket.blocks))
        offered.prefilled = Prefilled(first_token)
        offered.changed.set()

    def abort(self, id: AttemptId) -> None:
        """Gives the set up; `on_terminal` says when its blocks are let go. Repeats do nothing."""
        offered = self._by_attempt.get(id)
        if offered is not None:
            self._end(offered, SourceState.ABORTED)

    # --- the puller's side

    def check_borrower(self, incarnation: int, layout_fingerprint: bytes) -> None:
        """Whether it means this life of this worker, and lays out blocks alike: by name, nothing else is lent. Raises
        Refusal."""
        self._check_incarnation(incarnation)
        if layout_fingerprint != self.layout.fingerprint:
            raise Refusal(
                RefusalReason.LAYOUT_MISMATCH,
                f"blocks are lent to workers that lay them out as {self.worker_id} does ({self.layout}), fingerprint "
                f"{self.layout.fingerprint.hex()}; the borrower's is {layout_fingerprint.hex()}",
            )

    def keep(self, transfer_id: TransferId, incarnation: int) -> None:
        """Renews an offer for a puller that has no room yet and claims nothing until it has. Raises Refusal."""
        self._check_incarnation(incarnation)
        offered = self._live(transfer_id)
        if offered.lifetime.state is SourceState.OFFERED:  # a claim is renewed by its own stream alone
            offered.deadline = self._new_deadline()

    def claim(self, request: ClaimRequest) -> Claimant:
        """Raises Refusal; then nothing has changed, but that a set whose time was over is now seen to have ended."""
        self._check_incarnation(request.incarnation)
        difference = mismatch(self.layout, request.layout)
        if difference:
            raise Refusal(
                RefusalReason.LAYOUT_MISMATCH,
                f"{request.worker_id} can't use the blocks of {self.worker_id}: {difference}",
            )
        offered = self._live(request.transfer_id)
        if request.id != offered.ticket.id:
            raise Refusal(
                RefusalReason.UNKNOWN_TRANSFER,
                f"the claim is for {request.id}, the block set is of {offered.ticket.id}",
            )
        if request.first_block > len(offered.ticket.blocks):
            raise Refusal(
                RefusalReason.MALFORMED,
                f"first_block is {request.first_block}; the set has {len(offered.ticket.blocks)} blocks",
            )
        if offered.claimed_by not in (None, request.worker_id):
            raise Refusal(RefusalReason.ALREADY_CLAIMED, f"{offered.claimed_by} pulls the block set already")
        if offered.lifetime.state is SourceState.OFFERED:
            offered.lifetime.to(SourceState.CLAIMED)
            offered.claimed_by = request.worker_id
            self._permits.grant(request.transfer_id, offered.permit)
        offered.claimant = Claimant(offered, request.first_block, request.worker_id)
        offered.deadline = self._new_deadline()
        offered.changed.set()
        return offered.claimant

    def renew(self, claimant: Claimant) -> None:
        """Raises Refusal where the set has ended or another stream has taken over."""
        offered = self._current(claimant)
        if self._clock.now() >= offered.deadline:
            self._end(offered, SourceState.EXPIRED)
            raise self._refusal(offered.ticket.transfer_id)
        offered.deadline = self._new_deadline()

    def release(self, claimant: Claimant) -> None:
        """The puller is done. Raises Refusal where the set has ended otherwise."""
        self._end(self._current(claimant), SourceState.RELEASED)

    async def announcement(self, claimant: Claimant) -> list[tuple[int, int]] | Prefilled | None:
        """What is next to tell: (position, checksum) of sealed blocks in order, then that these were all, then None.
        Raises Refusal when the set ends first."""
        offered = claimant.offered
        while True:
            self._current(claimant)
            if claimant.next_position < offered.sealed_end:
                return await self._sealed(claimant)
            if offered.prefilled is not None and claimant.next_position >= len(offered.ticket.blocks):
                if claimant.told_all:
                    return None
                claimant.told_all = True
                return offered.prefilled
            offered.changed.clear()
            await offered.changed.wait()  # ends with the set at the latest, and that ends by its lease

    async def _sealed(self, claimant: Claimant) -> list[tuple[int, int]]:
        offered, start = claimant.offered, claimant.next_position
        end = min(offered.sealed_end, start + self._batch)
        missing = [position for position in range(start, end) if position not in offered.checksums]
        if missing:
            blocks = [int(offered.ticket.blocks[position].index) for position in missing]
            loop = asyncio.get_running_loop()
            sums = await loop.run_in_executor(self._executor, self._sum, offered.gate, blocks)
            self._current(claimant)
            assert sums is not None, "a live set's gate is open"
            offered.checksums.update(zip(missing, sums, strict=True))
        claimant.next_position = end
        return [(position, offered.checksums[position]) for position in range(start, end)]

    def _sum(self, gate: Gate, blocks: Sequence[int]) -> list[int] | None:
        with gate.passing() as admitted:
            return self._memory.checksums(blocks) if admitted else None

    # --- ends

    def reap(self) -> None:
        """Ends every set whose time is over."""
        now = self._clock.now()
        for offered in [s for s in self._sets.values() if now >= s.deadline]:
            log.info("%s: nobody %s its blocks in time", offered.ticket.id, _MISSED[offered.lifetime.state])
            self._end(offered, SourceState.EXPIRED)

    async def run_reaper(self) -> None:
        """Reaps until cancelled. Time for which this process was held up counts against nobody: what pullers said
        meanwhile has not been heard yet."""
        while True:
            pause = min(self.lease_seconds / 4, _MAX_REAP_SECONDS)
            due = self._clock.now() + pause
            await asyncio.sleep(pause)
            late = max(0.0, self._clock.now() - due)
            for offered in self._sets.values():
                offered.deadline += late
            try:
                self.reap()
            except Exception:
                log.exception("the reaper failed on a set and goes on with the others")

    async def drain(self, seconds: float) -> bool:
        """Waits until no set is live and nothing is in flight; False where `seconds` did not suffice."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def ticket(self, id: AttemptId) -> Ticket | None:
        """Of the attempt's live set."""
        offered = self._by_attempt.get(id)
        return None if offered is None else offered.ticket

    def live(self) -> tuple[AttemptId, ...]:
        """Attempts whose set is offered or claimed."""
        return tuple(self._by_attempt)

    def counts(self) -> dict[SourceState, int]:
        """Live sets by state."""
        return Counter(s.lifetime.state for s in self._sets.values())

    @property
    def draining(self) -> int:
        """Sets that have ended and whose bytes are still being read or sent."""
        return self._draining

    def _end(self, offered: _Offered, state: SourceState) -> None:
        ticket = offered.ticket
        offered.lifetime.to(state)
        del self._sets[ticket.transfer_id]
        del self._by_attempt[ticket.id]
        self._tombstones[ticket.transfer_id] = state
        if len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        self._permits.withdraw(ticket.transfer_id)
        offered.changed.set()
        self._draining += 1
        if offered.gate.close(partial(self._hop, asyncio.get_running_loop(), ticket.id)):
            self._let_go(ticket.id)

    def _hop(self, loop: asyncio.AbstractEventLoop, id: AttemptId) -> None:
        """On the thread of the last reader."""
        try:
            loop.call_soon_threadsafe(self._let_go, id)
        except RuntimeError:  # the loop is closed: the process ends, and its blocks with it
            log.debug("%s: its last reader outlived the event loop", id)

    def _let_go(self, id: AttemptId) -> None:
        self._draining -= 1
        if not self._sets and not self._draining:
            self._idle.set()
        self._on_terminal(id)

    def _check_incarnation(self, incarnation: int) -> None:
        if incarnation != self.incarnation:
            raise Refusal(
                RefusalReason.STALE_INCARNATION,
                f"the ticket is of incarnation {incarnation}, this is {self.incarnation} of {self.worker_id}",
            )

    def _live(self, transfer_id: TransferId) -> _Offered:
        offered = self._sets.get(transfer_id)
        if offered is not None and self._clock.now() >= offered.deadline:
            self._end(offered, SourceState.EXPIRED)
            offered = None
        if offered is None:
            raise self._refusal(transfer_id)
        return offered

    def _current(self, claimant: Claimant) -> _Offered:
        offered = claimant.offered
        if offered.lifetime.terminal:
            raise self._refusal(offered.ticket.transfer_id)
        if offered.claimant is not claimant:
            raise Refusal(RefusalReason.ALREADY_CLAIMED, "a later claim has taken this one's place")
        return offered

    def _refusal(self, transfer_id: TransferId) -> Refusal:
        state = self._tombstones.get(transfer_id)
        if state is None:
            return Refusal(RefusalReason.UNKNOWN_TRANSFER, f"{self.worker_id} knows of no such block set")
        return Refusal(*_REFUSALS[state])

    def _new_deadline(self) -> float:
        return self._clock.now() + self.lease_seconds


_MISSED = {SourceState.OFFERED: "claimed", SourceState.CLAIMED: "renewed the lease of"}
