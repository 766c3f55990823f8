"""The Transfer service of a source."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from baton.errors import HandoffFailed
from baton.ids import AttemptId
from baton.layout import KVLayout, mismatch
from baton.v1 import transfer_pb2 as pb
from kvtransfer.lifetimes import SourceState
from kvtransfer.service import check_claim
from kvtransfer.ticket import Ticket
from tests.fuzz.doors import BLOCKS, read, unless
from tests.fuzz.mutator import Mutator
from tests.kvtransfer.rig import INCARNATION, Rig, fill, holds, take


class PullDoor:
    """One set is offered, one claimed by a puller that says nothing more, one was released."""

    name = "pulls"

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._ledger = rig.ledger
        self._service = rig.service
        self._attempts = itertools.count()
        self._offer_anew()

    def _offer(self, first: int) -> tuple[Ticket, pb.PullRequest]:
        id = AttemptId("req-1", next(self._attempts))
        blocks = take(self._rig.source, range(first, first + BLOCKS))
        fill(self._rig.source, blocks)
        ticket = self._ledger.offer(id, blocks, BLOCKS * 16)
        self._ledger.seal(id, 1)
        claim = pb.Claim(
            transfer_id=ticket.transfer_id,
            incarnation=ticket.incarnation,
            request_id=id.request_id,
            attempt=id.attempt,
            layout_fingerprint=ticket.layout.fingerprint,
            layout=ticket.layout.to_proto(),
            worker_id="decode-0",
            transports=["shm", "tcp"],
        )
        return ticket, pb.PullRequest(claim=claim)

    def _offer_anew(self) -> None:
        for id in self._ledger.live():
            self._ledger.abort(id)
        self._rig.terminal.clear()
        self._offered, offered = self._offer(2)
        self._claimed, claimed = self._offer(10)
        released, replayed = self._offer(20)
        for message in (claimed, replayed):
            claimant = self._ledger.claim(check_claim(message.claim))
        self._ledger.release(claimant)
        self._gone = released
        self._rig.terminal.clear()
        self._firsts = [offered, offered, claimed, replayed]
        self._later = [pb.PullRequest(renew=pb.Renew()), pb.PullRequest(release=pb.Release()), offered]

    async def knock(self, mutator: Mutator) -> None:
        if mutator.rng.random() < 0.2:
            await self._keep(mutator)
            return
        rng = mutator.rng
        wires = [mutator.wire(rng.choice(self._firsts if rng.random() < 0.95 else self._later))]
        wires += [mutator.wire(rng.choice(self._later)) for _ in range(rng.choice((0, 0, 1, 2)))]
        messages = [read(pb.PullRequest, wire) for wire in wires]
        before, counted = self._state(), self._refusals()
        replies = [reply async for reply in self._service.Pull(_stream(messages), None)]
        unless(bool(replies), "a stream without an answer")
        if replies[0].WhichOneof("message") == "claimed":
            unless(self._may_claim(messages[0]), f"granted: {messages[0]}")
            self._offer_anew()
            return
        unless([r.WhichOneof("message") for r in replies] == ["refused"], f"neither granted nor refused: {replies}")
        unless(not self._may_claim(messages[0]), f"refused although right: {messages[0]}: {replies}")
        self._check_unchanged(before, counted)

    async def _keep(self, mutator: Mutator) -> None:
        ticket = mutator.rng.choice((self._offered, self._claimed, self._gone))
        right = pb.KeepRequest(transfer_id=ticket.transfer_id, incarnation=ticket.incarnation)
        message = read(pb.KeepRequest, mutator.wire(right))
        before, counted = self._state(), self._refusals()
        answer = await self._service.Keep(message, None)
        live = message.transfer_id in (self._offered.transfer_id, self._claimed.transfer_id)
        if answer.WhichOneof("message") == "renewed":
            unless(live and message.incarnation == INCARNATION, f"renewed for {message}")
            counted -= 1
        self._check_unchanged(before, counted)

    def _may_claim(self, message: pb.PullRequest) -> bool:
        claim = message.claim
        for ticket in (self._offered, self._claimed):
            if (
                message.WhichOneof("message") == "claim"
                and claim.transfer_id == ticket.transfer_id
                and claim.incarnation == ticket.incarnation
                and _matches(claim, ticket)
                and AttemptId(claim.request_id, claim.attempt) == ticket.id
                and claim.first_block <= len(ticket.blocks)
                and 0 < len(claim.worker_id) <= 256
                and len(claim.transports) <= 16
            ):
                return ticket is self._offered or claim.worker_id == "decode-0"
        return False

    def _state(self) -> tuple[Any, ...]:
        ledger, permits = self._ledger, self._rig.permits.snapshot()
        return dict(ledger.counts()), ledger.live(), tuple(permits), ledger.draining, len(self._rig.terminal)

    def _refusals(self) -> float:
        refused = self._rig.transfer_metrics.refused  # alone: to collect all metrics takes longer than all else here
        return sum(s.value for metric in refused.collect() for s in metric.samples if s.name.endswith("_total"))

    def _check_unchanged(self, before: tuple[Any, ...], counted: float) -> None:
        unless(self._state() == before, f"what was refused changed {before} to {self._state()}")
        unless(self._refusals() == counted + 1, "what was refused was not counted")

    async def rest(self) -> None:
        self._offer_anew()
        unless(self._ledger.counts() == {SourceState.OFFERED: 1, SourceState.CLAIMED: 1}, "not what was offered")
        ticket = self._offered
        self._ledger.prefilled(ticket.id, 5)
        destination = self._rig.reserve(BLOCKS)
        await self._rig.puller.pull(ticket, ticket.id, destination, 0)
        unless(holds(self._rig.destination, destination, ticket.blocks), "an honest pull brought other bytes")
        self._ledger.abort(self._claimed.id)
        async with asyncio.timeout(5):
            while self._ledger.counts() or self._ledger.draining:  # noqa: ASYNC110 - the release is on its way
                await asyncio.sleep(0.001)
        unless(not self._rig.permits.snapshot(), "a permit is left")
        unless(self._rig.puller.counts() == {}, "a landing is left")
        self._offer_anew()


def _matches(claim: pb.Claim, ticket: Ticket) -> bool:
    """Whether the claim's layout is one to which the set's blocks can be re-laid."""
    try:
        return not mismatch(ticket.layout, KVLayout.from_proto(claim.layout, claim.layout_fingerprint))
    except HandoffFailed:
        return False


async def _stream(messages: Sequence[pb.PullRequest]) -> AsyncIterator[pb.PullRequest]:
    for message in messages:
        yield message
