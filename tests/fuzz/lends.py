"""A worker that lends what it has cached: real service, role, scheduler and pool."""

from __future__ import annotations

import asyncio

from baton.hashing import block_hashes, root_hash
from baton.metrics import Metrics, TransferMetrics
from baton.v1 import transfer_pb2 as pb
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from kvtransfer.service import TransferService
from kvtransfer.ticket import Ticket
from tests.fuzz.doors import read, unless
from tests.fuzz.mutator import Mutator
from tests.worker.rig import BLOCK, FINGERPRINT, make_rig

PROMPT = [n % 50 for n in range(3, 25)]
NAMES = block_hashes(root_hash(FINGERPRINT), PROMPT, BLOCK)


class LendDoor:
    name = "lends"

    def __init__(self) -> None:
        self._rig = make_rig(Admission)
        self._metrics = TransferMetrics(Metrics())
        self._service = TransferService(self._rig.ledger, list, self._metrics, self._rig.lending.lend)
        self._right = pb.LendRequest(
            incarnation=self._rig.ledger.incarnation,
            request_id="peer",
            attempt=1,
            layout_fingerprint=self._rig.ledger.layout.fingerprint,
            worker_id="other",
            hashes=NAMES,
        )
        self._cached = False

    async def knock(self, mutator: Mutator) -> None:
        await self._fill_cache()
        message = read(pb.LendRequest, mutator.wire(self._right))
        refused = self._refusals()
        answer = await self._ask(message)
        if answer.WhichOneof("message") == "refused":
            unless(self._refusals() == refused + 1, "what was refused was not counted")
            unless(not self._rig.ledger.live(), "what was refused is held")
        else:
            self._check(message, Ticket.from_proto(answer.ticket))
            await self._end_offers()
        unless(self._rig.pool.counts().offered == 0, "blocks are held for nobody")

    def _check(self, message: pb.LendRequest, ticket: Ticket) -> None:
        right = self._right
        unless(message.incarnation == right.incarnation, "lent by another life")
        unless(message.layout_fingerprint == right.layout_fingerprint, "lent to one that lays blocks out otherwise")
        unless(0 < len(message.request_id) <= 256 and 0 < len(message.worker_id) <= 256, "lent to a name of any size")
        named = [block.hash for block in ticket.blocks]
        unless(named == list(message.hashes)[: len(named)], "other blocks than those that were asked for")
        unless(set(named) <= set(NAMES), "blocks that nobody cached")

    async def rest(self) -> None:
        await self._fill_cache()
        answer = await self._ask(self._right)
        unless([block.hash for block in answer.ticket.blocks] == NAMES, "an honest request is not served")
        await self._end_offers()
        self._rig.assert_idle()

    async def _ask(self, message: pb.LendRequest) -> pb.LendResponse:
        asking = asyncio.create_task(self._service.Lend(message, None))
        await asyncio.sleep(0)
        if not asking.done():
            await self._rig.turn()
        return await asking

    async def _end_offers(self) -> None:
        for attempt in self._rig.ledger.live():
            self._rig.ledger.abort(attempt)
        await self._rig.turn(2)

    async def _fill_cache(self) -> None:
        if not self._cached:
            self._rig.submit(worker_pb2.TASK_LOCAL, PROMPT)
            await self._rig.settle()
            self._cached = True

    def _refusals(self) -> float:
        refused = self._metrics.refused
        return sum(s.value for metric in refused.collect() for s in metric.samples if s.name.endswith("_total"))
