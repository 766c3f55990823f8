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
from baton.ids import AttemptId, BlockHash, BlockRef, WorkerId
from baton.layout import KVLayout
from baton.metrics import TransferMetrics
from baton.rpc import OpenChannel, open_channel
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer.arrival import Arrivals
from kvtransfer.channels import Channels
from kvtransfer.counting import count_state
from kvtransfer.landing import Landed, Landing
from kvtransfer.lifetimes import LIVE, DestinationState
from kvtransfer.memory import PoolMemory
from kvtransfer.pull import Pull, first_of
from kvtransfer.refusal import RefusalReason, Refusals, refusal_error
from kvtransfer.relayout import Share
from kvtransfer.reservation import Prompt, Reservation
from kvtransfer.threads import Threads
from kvtransfer.ticket import Ticket
from kvtransfer.transports.chooser import Connector

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 5.0
BORROW_SECONDS = 3.0
"""In which a worker says what it lends. Blocks of this worker's own are reserved meanwhile."""

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
        self._threads = threads
        self._clock = clock
        self._metrics = metrics
        self._refusals = Refusals(metrics)
        self._on_verified = on_verified
        self._channels = Channels(open_channel)
        self._landings: dict[asyncio.Task[None], Landing] = {}
        self._live: Counter[DestinationState] = Counter()
        self._arrivals = Arrivals(memory, layout, worker_id, connector, threads)

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
        pause = ticket.lease_seconds / 3
        renewed = self._clock.now()
        # Nobody knows how long the ticket was on its way, so the first word goes out early. Not at once: most requests
        # find room before.
        due = renewed + ticket.lease_seconds / 10
        while True:
            await asyncio.sleep(max(0.0, due - self._clock.now()))
            asked = self._clock.now()
            due = asked + pause
            try:
                async with self._channels.to(ticket.address) as channel:
                    answer = await transfer_pb2_grpc.TransferStub(channel).Keep(request, timeout=pause)
            except grpc.RpcError:
                if self._clock.now() >= renewed + ticket.lease_seconds:
                    raise PeerLost(
                        f"{source} has not answered within the lease of {ticket.lease_seconds:g} s"
                    ) from None
                continue
            if answer.WhichOneof("message") != "renewed":
                raise refusal_error(answer.refused, source)
            renewed = asked

    async def borrow(
        self, lender: WorkerId, address: str, incarnation: int, id: AttemptId, hashes: Sequence[BlockHash]
    ) -> Ticket:
        """Asks a worker for blocks by name, parents before children: the ticket of those, from the first on, that it
        has. Raises a HandoffFailed where it has none, or does not answer."""
        source = f"{lender} at {address}"
        request = pb.LendRequest(
            incarnation=incarnation,
            request_id=id.request_id,
            attempt=id.attempt,
            layout_fingerprint=self._layout.fingerprint,
            worker_id=self._worker_id,
            hashes=hashes,
        )
        async with self._channels.to(address) as channel:
            try:
                answer = await transfer_pb2_grpc.TransferStub(channel).Lend(request, timeout=BORROW_SECONDS)
            except grpc.RpcError as error:
                self._channels.forget(address)
                raise PeerLost(f"{source} does not lend its blocks: {_words(error)}") from None
        if answer.WhichOneof("message") != "ticket":
            raise refusal_error(answer.refused, source)
        return Ticket.from_proto(answer.ticket)

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
                await self._arrivals.sweep()
            except Exception:
                log.exception("the sweep of connections failed and goes on")

    async def close(self) -> None:
        """Cancels what is under way and lets go of every source."""
        for landing in list(self._landings.values()):
            landing.cancel("the worker stops")
        if self._landings:
            await asyncio.wait(list(self._landings))
        await self._arrivals.close()
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
        taken = await self._checked(tickets, reservation)
        together, lock = asyncio.Barrier(len(tickets)), threading.Lock()
        arrivals = [
            await stack.enter_async_context(self._arrivals.arrival(share, ticket, reservation, landing.gate, lock))
            for ticket, share in zip(tickets, taken, strict=True)
        ]
        pulls = [
            Pull(
                landing=landing,
                ticket=ticket,
                arrival=arrival,
                together=together,
                worker_id=self._worker_id,
                layout=self._layout,
                threads=self._threads,
                clock=self._clock,
                metrics=self._metrics,
            )
            for ticket, arrival in zip(tickets, arrivals, strict=True)
        ]
        for ticket, pull in zip(tickets, pulls, strict=True):
            channel = await stack.enter_async_context(self._channels.to(ticket.address))
            await stack.enter_async_context(pull.conversation(channel))
        return pulls

    async def _checked(self, tickets: Sequence[Ticket], reservation: Reservation) -> list[Share]:
        """What each gives. Raises LayoutMismatch, VerifyFailed or TransferRefused."""
        try:
            taken = self._arrivals.shares(tickets)
            for ticket in tickets:
                await self._check(reservation, ticket)
            reservation.check_generations(self._memory)
        except HandoffFailed as error:
            mismatch = isinstance(error, LayoutMismatch)
            self._refusals.note(RefusalReason.LAYOUT_MISMATCH if mismatch else RefusalReason.MALFORMED, error.message)
            raise
        return taken

    async def _check(self, reservation: Reservation, ticket: Ticket) -> None:
        if ticket.layout.block_size == self._layout.block_size:
            reservation.check_offer(ticket, self._layout)
            return
        loop = asyncio.get_running_loop()  # a long prompt is named anew: milliseconds
        await loop.run_in_executor(self._threads.memory, reservation.check_offer, ticket, self._layout)

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

    def _fail(self, landing: Landing, error: BaseException) -> None:
        if isinstance(error, HandoffFailed):
            if landing.fail(error):
                log.info("%s: %s", landing.id, error.message)
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


def _words(error: grpc.RpcError) -> str:
    return (error.details() if isinstance(error, grpc.aio.AioRpcError) else None) or str(error)


def _whole(parts: Sequence[Landed]) -> Landed:
    """Of a landing whose parts came from several sources. Raises VerifyFailed where they don't agree."""
    tokens = {part.first_token for part in parts}
    if len(tokens) > 1:
        raise VerifyFailed(f"the sources drew different first tokens: {', '.join(sorted(map(str, tokens)))}")
    return Landed(
        first_token=parts[0].first_token,
        blocks=sum(part.blocks for part in parts),
        bytes=sum(part.bytes for part in parts),
        seconds=max(part.seconds for part in parts),
        transport="+".join(sorted({part.transport for part in parts if part.transport})),
        own_dtype=all(part.own_dtype for part in parts),
    )
