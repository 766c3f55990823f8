"""The puller: brings offered blocks into this worker's pool, one landing a block set.

Owned by the event loop. It knows the landings under way, the channels and the connections; what one pull says and does
is in pull.py, and when its blocks may be used in landing.py. It holds nothing of the source's while it waits for
anything of this worker's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import grpc.aio

from baton.clock import Clock
from baton.errors import HandoffFailed, InternalError, LayoutMismatch, PeerLost, RequestCancelled, VerifyFailed
from baton.ids import AttemptId, BlockRef, WorkerId
from baton.layout import KVLayout, differences, rounds
from baton.metrics import TransferMetrics
from baton.rpc import OpenChannel, open_channel
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer.arrival import Arrival, InPlace, Relaid
from kvtransfer.channels import Channels
from kvtransfer.counting import count_state
from kvtransfer.landing import Landed, Landing
from kvtransfer.lifetimes import LIVE, DestinationState
from kvtransfer.memory import PoolMemory
from kvtransfer.pull import Pull, first_of
from kvtransfer.refusal import refusal_error
from kvtransfer.relayout import Relayout, Share, shares
from kvtransfer.reservation import Prompt, Reservation
from kvtransfer.staging import Stagings
from kvtransfer.threads import Threads
from kvtransfer.ticket import Ticket
from kvtransfer.transports.chooser import Connector

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 5.0
_MAX_NOTED = 1024

OnVerified = Callable[[AttemptId, Sequence[BlockRef], int], None]
"""Told of a block set, and of its first position that was missing, between verification and commit: nobody may read
the blocks yet, and nobody writes them any more. A seam for tests, which damage a block there, where nothing guards it
any more, and look whether answers show it. Workers leave it empty, and no setting reaches it."""


class Puller:
    def __init__(
        self,
        *,
        memory: PoolMemory,
        layout: KVLayout,
        worker_id: WorkerId,
        connector: Connector,
        threads: Threads,
        clock: Clock,
        metrics: TransferMetrics,
        on_verified: OnVerified | None = None,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self._memory = memory
        self._layout = layout
        self._worker_id = worker_id
        self._connector = connector
        self._threads = threads
        self._clock = clock
        self._metrics = metrics
        self._on_verified = on_verified
        self._channels = Channels(open_channel)
        self._landings: dict[asyncio.Task[None], Landing] = {}
        self._live: Counter[DestinationState] = Counter()
        self._stagings = Stagings(connector)
        self._relaid_from: set[tuple[WorkerId, bytes]] = set()

    def land(
        self,
        ticket: Ticket,
        id: AttemptId,
        destination: Sequence[BlockRef],
        first_missing: int,
        prompt: Prompt | None = None,
        shards: Sequence[Ticket] = (),
    ) -> Landing:
        """Begins to pull what `ticket` offers into the blocks of `destination`, which hold the same tokens under the
        hashes that are expected. Those before position `first_missing` hold their KV already. `prompt` is needed where
        the source's blocks may have another size. `shards` are the tickets of the workers that share the source's heads
        with it: the landing is good when all of them have given theirs. Needs the running event loop. Whatever is
        wrong comes out of the landing's `done`."""
        landing = Landing(id, self._changed)
        reservation = Reservation(id, tuple(destination), first_missing, prompt)
        task = asyncio.get_running_loop().create_task(
            self._pull(landing, (ticket, *shards), reservation), name=f"pull {id}"
        )
        self._landings[task] = landing
        task.add_done_callback(self._landings.pop)
        landing.run(task)
        return landing

    async def keep(self, ticket: Ticket) -> None:
        """Keeps an offer alive until cancelled, for a request that waits for blocks to land in. Raises a HandoffFailed
        once the offer is over, or its source has not answered within the lease."""
        source = f"{ticket.worker_id} at {ticket.address}"
        request = pb.KeepRequest(transfer_id=ticket.transfer_id, incarnation=ticket.incarnation)
        deadline = self._clock.now() + ticket.lease_seconds
        pause = ticket.lease_seconds / 3
        while True:
            await asyncio.sleep(pause)
            asked = self._clock.now()
            try:
                async with self._channels.to(ticket.address) as channel:
                    answer = await transfer_pb2_grpc.TransferStub(channel).Keep(request, timeout=pause)
            except grpc.RpcError:
                if self._clock.now() >= deadline:
                    raise PeerLost(
                        f"{source} has not answered within the lease of {ticket.lease_seconds:g} s"
                    ) from None
                continue
            if answer.WhichOneof("message") != "renewed":
                raise refusal_error(answer.refused, source)
            deadline = asked + ticket.lease_seconds

    async def pull(
        self,
        ticket: Ticket,
        id: AttemptId,
        destination: Sequence[BlockRef],
        first_missing: int,
        prompt: Prompt | None = None,
        shards: Sequence[Ticket] = (),
    ) -> Landed:
        """`land` and wait. Cancelled, it cancels the landing. Either way, when it ends nobody writes any more."""
        landing = self.land(ticket, id, destination, first_missing, prompt, shards)
        try:
            return await landing.done()
        finally:
            landing.cancel()
            await landing.drained()

    def counts(self) -> dict[DestinationState, int]:
        """Landings by state, of those that still hold blocks which are not the engine's again."""
        return dict(+self._live)

    async def sweep(self) -> None:
        """Until cancelled: lets go of sources that died, whose memory a mapping would keep."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                await self._connector.sweep()
                await self._stagings.sweep()
            except Exception:
                log.exception("the sweep of connections failed and goes on")

    async def close(self) -> None:
        """Cancels what is under way and lets go of every source."""
        for landing in list(self._landings.values()):
            landing.cancel("the worker stops")
        if self._landings:
            await asyncio.wait(list(self._landings))
        await self._connector.close()
        await self._stagings.close()
        await self._channels.close()

    async def _pull(self, landing: Landing, tickets: Sequence[Ticket], reservation: Reservation) -> None:
        """Whatever happens, the landing is done before this says goodbye to the sources, and it never raises."""
        try:
            async with AsyncExitStack() as stack:
                pulls = await self._begin(stack, landing, tickets, reservation)
                try:
                    landed = _whole(await self._together(pulls))
                    if not landing.verify():
                        raise VerifyFailed("a writer is left although every block has landed")
                    reservation.check_generations(self._memory)
                    for pull in pulls:
                        pull.check_lease()
                    if self._on_verified is not None:
                        self._on_verified(landing.id, reservation.blocks, reservation.first_missing)
                except BaseException as error:
                    self._fail(landing, error)
                    raise
                landing.commit(landed)
                self._metrics.seconds.labels(transport=landed.transport or "none").observe(landed.seconds)
        except BaseException as error:
            self._fail(landing, error)
            if not isinstance(error, (Exception, asyncio.CancelledError)):
                raise

    async def _begin(
        self, stack: AsyncExitStack, landing: Landing, tickets: Sequence[Ticket], reservation: Reservation
    ) -> list[Pull]:
        """Checks every ticket before it asks any source, and opens a conversation with each."""
        taken = self._shares(tickets)
        for ticket in tickets:
            await self._check(reservation, ticket)
        reservation.check_generations(self._memory)
        together, lock = asyncio.Barrier(len(tickets)), threading.Lock()
        pulls = [
            Pull(
                landing=landing,
                ticket=ticket,
                arrival=self._arrival(stack, landing, share, ticket, reservation, lock),
                together=together,
                worker_id=self._worker_id,
                layout=self._layout,
                threads=self._threads,
                clock=self._clock,
                metrics=self._metrics,
            )
            for ticket, share in zip(tickets, taken, strict=True)
        ]
        for ticket, pull in zip(tickets, pulls, strict=True):
            channel = await stack.enter_async_context(self._channels.to(ticket.address))
            await stack.enter_async_context(pull.conversation(channel))
        return pulls

    def _shares(self, tickets: Sequence[Ticket]) -> list[Share]:
        try:
            return shares([ticket.layout for ticket in tickets], self._layout)
        except LayoutMismatch as error:
            sources = ", ".join(f"{ticket.worker_id} at {ticket.address}" for ticket in tickets)
            raise LayoutMismatch(f"{self._worker_id} can't use the blocks of {sources}: {error.message}") from None

    async def _check(self, reservation: Reservation, ticket: Ticket) -> None:
        if ticket.layout.block_size == self._layout.block_size:
            reservation.check_offer(ticket, self._layout)
            return
        loop = asyncio.get_running_loop()  # a long prompt is named anew: milliseconds
        await loop.run_in_executor(self._threads.memory, reservation.check_offer, ticket, self._layout)

    def _arrival(
        self,
        stack: AsyncExitStack,
        landing: Landing,
        share: Share,
        ticket: Ticket,
        reservation: Reservation,
        lock: threading.Lock,
    ) -> Arrival:
        places = [int(block.index) for block in reservation.blocks]
        if share.as_it_is:
            return InPlace(self._memory, self._connector, places, reservation.first_missing, landing.gate)
        self._note_relaying(ticket)
        relayout = Relayout(share, self._memory, places, reservation.first_missing, ticket.num_tokens, lock)
        staging = stack.enter_context(self._stagings.use(share.source))
        return Relaid(relayout, staging, landing.gate, self._threads)

    async def _together(self, pulls: Sequence[Pull]) -> list[Landed]:
        """All of them, or the first that fails."""
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(self._run(pull)) for pull in pulls]
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        return [task.result() for task in running]

    async def _run(self, pull: Pull) -> Landed:
        try:
            return await pull.run()
        except PeerLost:
            self._channels.forget(pull.address)
            raise

    def _note_relaying(self, ticket: Ticket) -> None:
        """Once a source: what is done to its blocks, and what that costs in exactness."""
        source = (ticket.worker_id, ticket.layout.fingerprint)
        if source in self._relaid_from:
            return
        if len(self._relaid_from) >= _MAX_NOTED:
            self._relaid_from.clear()
        self._relaid_from.add(source)
        rounding = rounds(ticket.layout, self._layout)
        log.warning(
            "blocks of %s at %s are re-laid on their way in: %s%s",
            ticket.worker_id, ticket.address, differences(ticket.layout, self._layout),
            f"; values are rounded to {self._layout.dtype}" if rounding else "; no value changes",
        )  # fmt: skip

    def _fail(self, landing: Landing, error: BaseException) -> None:
        if isinstance(error, HandoffFailed):
            log.info("%s: %s", landing.id, error.message)
            landing.fail(error)
        elif isinstance(error, asyncio.CancelledError):
            landing.fail(RequestCancelled("the landing was cancelled"))
        elif landing.fail(InternalError(f"the pull of {landing.id} failed by a defect: {error!r}")):
            log.error("%s: the pull failed by a defect", landing.id, exc_info=error)

    def _changed(self, old: DestinationState | None, new: DestinationState) -> None:
        count_state(self._metrics, old, new)
        if old is not None:
            self._live[old] -= 1
        if new.value in LIVE:
            self._live[new] += 1


def _whole(parts: Sequence[Landed]) -> Landed:
    """Of a landing whose parts came from several sources. Raises VerifyFailed where they don't agree."""
    tokens = {part.first_token for part in parts}
    if len(tokens) > 1:
        raise VerifyFailed(f"the sources drew different first tokens: {sorted(tokens)}")
    return Landed(
        first_token=parts[0].first_token,
        blocks=sum(part.blocks for part in parts),
        bytes=sum(part.bytes for part in parts),
        seconds=max(part.seconds for part in parts),
        transport="+".join(sorted({part.transport for part in parts if part.transport})),
        own_dtype=all(part.own_dtype for part in parts),
    )
