"""One pull: the conversation with the source, and the fetching of what it announces.

It claims, fetches sealed blocks while the source computes the next, verifies them where they arrived, and keeps the
lease. What it pulls was checked before (reservation.py); whether the blocks may be read then is the landing's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from baton.clock import Clock
from baton.errors import HandoffFailed, LeaseExpired, PeerLost, TransferRefused, VerifyFailed
from baton.ids import WorkerId
from baton.layout import KVLayout
from baton.metrics import TransferMetrics
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer.arrival import Arrival, Room
from kvtransfer.landing import Landed, Landing
from kvtransfer.refusal import refusal_error
from kvtransfer.threads import Threads
from kvtransfer.ticket import MAX_LEASE_SECONDS, Ticket
from kvtransfer.transports.base import MAX_FETCH_BLOCKS, Connection, Endpoint, Fetched, Want

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 2.0
_MESSAGES = 16  # read ahead of what is being handled
_MAX_ENDPOINTS = 16

_Call = grpc.aio.StreamStreamCall[pb.PullRequest, pb.PullResponse]


class Pull:
    def __init__(
        self,
        *,
        landing: Landing,
        ticket: Ticket,
        arrival: Arrival,
        together: asyncio.Barrier,
        worker_id: WorkerId,
        layout: KVLayout,
        threads: Threads,
        clock: Clock,
        metrics: TransferMetrics,
    ) -> None:
        """`together` is where the pulls of a landing wait for each other, leases kept, when each has its part."""
        self._landing = landing
        self._ticket = ticket
        self._arrival = arrival
        self._together = together
        self._worker_id = worker_id
        self._layout = layout
        self._threads = threads
        self._clock = clock
        self._metrics = metrics
        self._source = f"{ticket.worker_id} at {ticket.address}"
        self._lease_seconds = ticket.lease_seconds
        self._deadline = clock.now() + ticket.lease_seconds
        self._asked: deque[float] = deque()  # when each unanswered renewal was sent
        self._missing = len(ticket.blocks) - arrival.first_block
        self._verified = 0
        self._first_token: int | None = None
        self._prefilled = False
        self._claim_sent = False
        self._claimed = asyncio.Event()
        self._complete = asyncio.Event()
        self._announced: dict[int, int] = {}  # position -> checksum
        self._connection: Connection | None = None
        self._transport = ""
        self._inbox: asyncio.Queue[pb.PullResponse | HandoffFailed] = asyncio.Queue(_MESSAGES)
        self._batch = 1  # blocks of a fetch; the connection says how many

    @contextlib.asynccontextmanager
    async def conversation(self, channel: grpc.aio.Channel) -> AsyncIterator[None]:
        """The stream to the source. On leaving, the set is released, whatever came of the pull: the source need not
        hold its blocks until the lease runs out."""
        self._call: _Call = transfer_pb2_grpc.TransferStub(channel).Pull()
        reader = asyncio.create_task(self._read(self._call))
        try:
            yield
        finally:
            try:
                async with asyncio.timeout(GOODBYE_SECONDS):
                    if self._claim_sent:
                        await self._write(pb.PullRequest(release=pb.Release()))
                    await self._call.done_writing()
                    await self._skip_rest(reader)
            except (TimeoutError, grpc.RpcError, asyncio.InvalidStateError) as error:
                log.debug("%s: no goodbye to %s: %r", self._landing.id, self._source, error)
            finally:
                reader.cancel()
                self._call.cancel()

    async def run(self) -> Landed:
        """Inside `conversation`. Returns what landed, verified, once all pulls of the landing have their parts. Raises
        a HandoffFailed."""
        started = self._clock.now()
        try:
            async with asyncio.TaskGroup() as group:
                background = [group.create_task(self._hear(group)), group.create_task(self._keep_lease())]
                await self._complete.wait()  # one task that fails ends them all
                await self._together.wait()
                for task in background:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        return Landed(
            first_token=self._first_token,
            blocks=self._missing,
            bytes=self._missing * self._arrival.memory.block_bytes,
            seconds=self._clock.now() - started,
            transport=self._transport,
            own_dtype=self._ticket.layout.dtype == self._layout.dtype,
        )

    @property
    def address(self) -> str:
        return self._ticket.address

    def check_lease(self) -> None:
        """Raises LeaseExpired where the source may have let go of what it holds for this pull."""
        if self._clock.now() >= self._deadline:
            raise LeaseExpired(
                f"{self._source} did not answer within the lease of {self._lease_seconds:g} s: what it holds for "
                "this pull may be gone"
            )

    # --- the conversation

    async def _hear(self, group: asyncio.TaskGroup) -> None:
        """Claims, then begins to fetch what is announced. Until cancelled: a source may be lost, or give the request
        up, while its last blocks are fetched."""
        await self._claim()
        while True:
            message = await self._next()
            match message.WhichOneof("message"):
                case "sealed":
                    positions = self._take_announcement(message.sealed)
                    for start in range(0, len(positions), self._batch):
                        group.create_task(self._bring(positions[start : start + self._batch]))
                case "prefilled":
                    prefilled = message.prefilled
                    self._first_token = prefilled.token_id if prefilled.HasField("token_id") else None
                    self._prefilled = True
                    hidden = self._metrics.hidden_bytes.labels(transport=self._transport)
                    hidden.inc(self._verified * self._arrival.memory.block_bytes)
                    self._check_complete()
                case "renewed":
                    self._take_lease(message.renewed.lease_ms)
                case said:
                    raise TransferRefused(f"{self._source} said {said or 'nothing known'} behind its claimed")

    async def _claim(self) -> None:
        ticket = self._ticket
        self._asked.append(self._clock.now())
        claim = pb.Claim(
            transfer_id=ticket.transfer_id,
            incarnation=ticket.incarnation,
            request_id=ticket.id.request_id,
            attempt=ticket.id.attempt,
            layout_fingerprint=self._layout.fingerprint,
            first_block=self._arrival.first_block,
            worker_id=self._worker_id,
            transports=self._arrival.connector.names,
            layout=self._layout.to_proto(),
        )
        self._claim_sent = True
        await self._write(pb.PullRequest(claim=claim))
        message = await self._next()
        if message.WhichOneof("message") != "claimed":
            raise TransferRefused(f"{self._source} answered the claim with {message.WhichOneof('message')}")
        self._take_lease(message.claimed.lease_ms)
        if self._missing:
            endpoints = [Endpoint(e.transport, e.address) for e in message.claimed.endpoints[:_MAX_ENDPOINTS]]
            self._transport, self._connection = await self._arrival.connector.open(endpoints)
            fetch = self._connection.fetch_bytes // self._arrival.memory.block_bytes
            self._batch = max(1, min(MAX_FETCH_BLOCKS, fetch, self._arrival.memory.num_blocks))
        self._landing.land()
        self._claimed.set()

    def _take_announcement(self, message: pb.Sealed) -> list[int]:
        """The positions that are to be fetched."""
        positions: list[int] = []
        for block in message.blocks:
            position = block.position
            if not self._arrival.first_block <= position < len(self._ticket.blocks):
                raise TransferRefused(
                    f"{self._source} announced position {position}, which was not asked for: "
                    f"[{self._arrival.first_block}, {len(self._ticket.blocks)})"
                )
            if position not in self._announced:  # a repeat is harmless
                self._announced[position] = block.checksum
                positions.append(position)
        return positions

    def _take_lease(self, lease_ms: int) -> None:
        """The lease runs from when it was asked for: the answer's way back may have taken any time."""
        lease_seconds = lease_ms / 1000
        if not self._asked:
            raise TransferRefused(f"{self._source} answered a renewal that was not asked for")
        if not 0 < lease_seconds <= MAX_LEASE_SECONDS:
            raise TransferRefused(f"{self._source} gives a lease of {lease_seconds:g} s")
        self._lease_seconds = lease_seconds
        self._deadline = self._asked.popleft() + lease_seconds

    async def _keep_lease(self) -> None:
        """Renews in time, and ends the pull when it was in vain. So nothing that the pull waits for lasts for ever."""
        while True:
            left = self._deadline - self._clock.now()
            await asyncio.sleep(max(0.0, min(self._lease_seconds / 3, left)))
            self.check_lease()
            if self._claimed.is_set():
                self._asked.append(self._clock.now())
                await self._write(pb.PullRequest(renew=pb.Renew()))

    # --- the bytes

    async def _bring(self, positions: Sequence[int]) -> None:
        """Fetches blocks and verifies them where they arrived; one that is other than it was sent is fetched again."""
        connection = self._connection
        assert connection is not None, "announced blocks follow a claim"
        async with connection.slots, self._arrival.room(positions) as room:
            wrong = await self._fetch(connection, positions, room)
            if wrong:
                self._metrics.verify_failures.labels(reason="checksum").inc(len(wrong))
                log.warning("%s: %d blocks landed damaged, pulling them again", self._landing.id, len(wrong))
                wrong = await self._fetch(connection, wrong, room)
            if wrong:
                self._metrics.verify_failures.labels(reason="checksum").inc(len(wrong))
                raise VerifyFailed(
                    f"block {wrong[0]} from {self._source} by {self._transport} has another checksum than it was "
                    "announced with, and had when pulled again"
                )
            await self._arrival.settle(room, positions)
        self._verified += len(positions)
        self._landing.arrived += len(positions)
        size = len(positions) * self._arrival.memory.block_bytes
        self._metrics.bytes.labels(transport=self._transport).inc(size)
        if self._ticket.layout != self._layout:
            self._metrics.relaid_bytes.inc(size)
        self._check_complete()

    async def _fetch(self, connection: Connection, positions: Sequence[int], room: Room) -> list[int]:
        """Those whose bytes, where they arrived, are not what was announced."""
        blocks, by_transport = self._ticket.blocks, self._ticket.checksum_kind is self._arrival.memory.checksum_kind
        sums = self._announced if by_transport else {}
        wants = [Want(int(blocks[p].index), int(blocks[p].generation), room.places[p], sums.get(p)) for p in positions]
        results = await connection.fetch(self._ticket.transfer_id, wants, room.gate)
        for position, result in zip(positions, results, strict=True):
            if result is Fetched.STALE:
                self._metrics.verify_failures.labels(reason="generation").inc()
                raise VerifyFailed(
                    f"block {position} of {self._source} is no longer of generation "
                    f"{blocks[position].generation}: it was given to another use while it was pulled"
                )
            if result is Fetched.REFUSED:
                raise TransferRefused(f"{self._source} does not give block {position} out (any more)")
        if by_transport:
            return [p for p, result in zip(positions, results, strict=True) if result is Fetched.DAMAGED]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads.memory, self._damaged, positions, room)

    def _damaged(self, positions: Sequence[int], room: Room) -> list[int]:
        """Those whose bytes have another checksum than was announced, of a kind that the arrival's memory does not
        take: this host does. That costs a pass over bytes that have left the caches, by NH at a few GB/s, and where
        they landed in device memory their way back."""
        kind, memory = self._ticket.checksum_kind, self._arrival.memory
        with room.gate.passing() as admitted:
            if not admitted:
                raise TransferRefused("the landing was given up")
            return [p for p in positions if kind.of(memory.read(room.places[p])) != self._announced[p]]

    def _check_complete(self) -> None:
        if self._prefilled and self._verified == self._missing:
            self._complete.set()

    # --- the stream

    async def _next(self) -> pb.PullResponse:
        message = await self._inbox.get()
        if isinstance(message, HandoffFailed):
            raise message
        if message.WhichOneof("message") == "refused":
            raise refusal_error(message.refused, self._source)
        return message

    async def _read(self, call: _Call) -> None:
        """Until the stream ends; why it did is the last thing in the inbox."""
        try:
            while isinstance(message := await call.read(), pb.PullResponse):
                await self._inbox.put(message)
            await self._inbox.put(PeerLost(f"{self._source} ended the stream before the pull was complete"))
        except grpc.RpcError as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            await self._inbox.put(PeerLost(f"{self._source} can't be reached: {details}"))

    async def _skip_rest(self, reader: asyncio.Task[None]) -> None:
        """Reads on until the source has ended the stream, which says that it has seen the release."""
        while not reader.done():
            getter = asyncio.ensure_future(self._inbox.get())
            await asyncio.wait({getter, reader}, return_when=asyncio.FIRST_COMPLETED)
            getter.cancel()

    async def _write(self, message: pb.PullRequest) -> None:
        """Where the stream is down, does nothing: the reader learns why, and says so."""
        try:
            await self._call.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            log.debug("%s: could not write to %s: %r", self._landing.id, self._source, error)


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended the others, of a group that may hold groups."""
    first = failures.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
