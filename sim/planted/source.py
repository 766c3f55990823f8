"""Bugs of the side that offers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from baton.errors import InternalError
from baton.ids import AttemptId, BlockRef, TransferId
from engine.holdings import Holdings
from engine.request import Request
from kvtransfer.lifetimes import SourceState
from kvtransfer.source import SourceLedger
from kvtransfer.ticket import Ticket
from kvtransfer.transports.base import Fetched, Want
from kvtransfer.transports.fake import FakeSource
from sim.planted.plant import Plant
from worker.core import WorkerCore


def _abort_once(self: SourceLedger, id: AttemptId) -> None:
    if id not in self._by_attempt:
        raise InternalError(f"{id} is completed already")
    _abort(self, id)


_abort = SourceLedger.abort


def _end_but_for_expiry(self: SourceLedger, offered: Any, state: SourceState) -> None:
    if state is SourceState.EXPIRED:
        offered.deadline = float("inf")  # said once is enough
        return
    _end(self, offered, state)


_end = SourceLedger._end


def _live_or_not(self: SourceLedger, transfer_id: TransferId) -> Any:
    if transfer_id not in self._sets:
        raise self._refusal(transfer_id)
    return self._sets[transfer_id]


async def _never_reap(self: SourceLedger) -> None:
    await asyncio.Event().wait()


def _reap_and_offer(self: SourceLedger, id: AttemptId, blocks: Sequence[BlockRef], num_tokens: int) -> Ticket:
    self.reap()
    return _offer(self, id, blocks, num_tokens)


_offer = SourceLedger.offer


def _offer_nothing(self: Holdings, request: Request) -> None:
    self._offered[request.id] = []


def _read_whatever_is_there(self: FakeSource, permit: Any, want: Want) -> tuple[Fetched, bytes]:
    with permit.gate.passing() as admitted:
        if not admitted or not permit.covers(want.source, want.generation):
            return Fetched.REFUSED, b""
        return Fetched.LANDED, bytes(self._memory.read(want.source))


def _forget_at_the_end(self: WorkerCore, request_id: AttemptId, *rest: Any) -> None:
    _end_attempt(self, request_id, *rest)
    attempt = self._attempts.get(request_id)
    if attempt is not None and attempt.ended:
        self._forget(request_id)


_end_attempt = WorkerCore._end

PLANTS = (
    Plant(
        "completed-twice",
        "vllm#46240",
        "a request that is completed by two at once, its puller and a cancel, is an error that ends the session",
        ((SourceLedger, "abort", _abort_once),),
    ),
    Plant(
        "lease-only-logged",
        "aws-do-eks#84",
        "that a lease ran out is logged, and nothing is done about it",
        ((SourceLedger, "_end", _end_but_for_expiry), (SourceLedger, "_live", _live_or_not)),
    ),
    Plant(
        "reaped-when-scheduled",
        "TensorRT-LLM#12313",
        "leases are looked at only when another request is taken on",
        ((SourceLedger, "run_reaper", _never_reap), (SourceLedger, "offer", _reap_and_offer)),
    ),
    Plant(
        "evicted-before-sent",
        "TensorRT-LLM#12542",
        "offered blocks are not held until they are sent, and the transport does not look at generations",
        ((Holdings, "offer", _offer_nothing), (FakeSource, "read", _read_whatever_is_there)),
    ),
    Plant(
        "drained-under-transfer",
        "dynamo#4917",
        "a worker that drains waits for its requests, and not for those who still read their blocks",
        ((WorkerCore, "_end", _forget_at_the_end),),
    ),
)
