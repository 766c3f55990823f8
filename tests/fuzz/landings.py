"""A puller, and a source that says anything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from baton.errors import BatonError, HandoffFailed, TransferRefused
from baton.ids import AttemptId
from baton.v1 import transfer_pb2 as pb
from kvtransfer.destination import Puller
from kvtransfer.ticket import Ticket
from kvtransfer.transports.shm import shm_endpoint
from tests.fuzz.doors import BLOCKS, read, unless
from tests.fuzz.mutator import Mutator
from tests.kvtransfer.rig import LAYOUT, Rig, fill, holds, take

_SHORT, _LONG = 0.01, 5.0
"""Seconds: for what seldom ends well, and for what must."""


class Call:
    """A source's side of a stream: it says what was written down, and hangs up behind the puller, or when that takes
    too long."""

    def __init__(self, said: Sequence[bytes], patience: float) -> None:
        self._said = iter(said)
        self._patience = patience
        self._over = asyncio.Event()

    async def write(self, message: pb.PullRequest) -> None:
        pass

    async def done_writing(self) -> None:
        self._over.set()

    async def read(self) -> pb.PullResponse | None:
        """None at the end, and where it can't be read, as gRPC does."""
        await asyncio.sleep(0)
        if (wire := next(self._said, None)) is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self._patience)
            return None
        try:
            return pb.PullResponse.FromString(wire)
        except DecodeError:
            return None

    def cancel(self) -> None:
        pass


class HostileSource:
    """A puller's channels, all of which lead to it."""

    def __init__(self) -> None:
        self.says: list[bytes] = []
        self.patience = _SHORT

    def __call__(self, address: str, options: object) -> Any:
        return self

    def stream_stream(self, *_: Any, **__: Any) -> Any:
        return lambda **_: Call(self.says, self.patience)

    def unary_unary(self, *_: Any, **__: Any) -> Any:
        return None

    async def close(self) -> None:
        pass


class LandingDoor:
    """What a puller hears from a source, and where it takes the bytes from."""

    name = "landings"

    def __init__(self, rig: Rig, puller: Puller, source: HostileSource) -> None:
        self._rig = rig
        self._puller = puller
        self._source = source
        self._blocks = take(rig.source, range(50, 50 + BLOCKS))
        fill(rig.source, self._blocks)
        self._id = AttemptId("landing", 0)

    def _conversation(self) -> tuple[pb.Ticket, list[pb.PullResponse]]:
        rig = self._rig
        ticket = Ticket(
            transfer_id=rig.ledger.offer(self._id, self._blocks, BLOCKS * 16).transfer_id,
            worker_id=rig.ledger.worker_id,
            address=rig.address,
            incarnation=rig.ledger.incarnation,
            layout=LAYOUT,
            blocks=tuple(self._blocks),
            lease_seconds=5.0,
            num_tokens=BLOCKS * 16,
            id=self._id,
            checksum_kind=rig.source.checksum_kind,
        )
        rig.ledger.abort(self._id)
        rig.terminal.clear()
        sums = rig.source.checksums([int(b.index) for b in self._blocks])
        endpoint = shm_endpoint(rig.source)
        return ticket.to_proto(), [
            pb.PullResponse(claimed=pb.Claimed(
                endpoints=[pb.Endpoint(transport=endpoint.transport, address=endpoint.address)], lease_ms=5000)),
            pb.PullResponse(sealed=pb.Sealed(
                blocks=[pb.SealedBlock(position=p, checksum=c) for p, c in enumerate(sums[:2])])),
            pb.PullResponse(sealed=pb.Sealed(blocks=[pb.SealedBlock(position=2, checksum=sums[2])])),
            pb.PullResponse(prefilled=pb.Prefilled(token_id=7)),
        ]  # fmt: skip

    async def knock(self, mutator: Mutator) -> None:
        rng = mutator.rng
        proto, messages = self._conversation()
        said = [message.SerializeToString() for message in messages]
        match rng.randrange(5):
            case 0:
                proto = read(pb.Ticket, mutator.wire(proto))
            case 1:  # it lies about which block is which
                one, other = rng.sample(range(BLOCKS), 2)
                proto.blocks[one].index, proto.blocks[other].index = proto.blocks[other].index, proto.blocks[one].index
            case 2:
                rng.shuffle(said)
            case _:
                at = rng.randrange(len(said))
                said[at] = mutator.wire(messages[at])
        with contextlib.suppress(TransferRefused):
            await self._land(Ticket.from_proto(proto), said)

    async def _land(self, ticket: Ticket, said: Sequence[bytes]) -> str:
        """Why it failed; nothing where it did not."""
        why = ""
        self._source.says = list(said)
        destination = self._rig.reserve(BLOCKS)
        landing = self._puller.land(ticket, self._id, destination, 0)
        try:
            async with asyncio.timeout(10):
                await landing.done()
        except BatonError as error:
            why = f"{type(error).__name__}: {error.message}"
            unless(isinstance(error, HandoffFailed), why)
        else:
            unless(holds(self._rig.destination, destination, self._blocks), "other bytes were committed")
        async with asyncio.timeout(10):
            await landing.drained()
        return why

    async def rest(self) -> None:
        ticket, messages = self._conversation()
        self._source.patience = _LONG
        why = await self._land(Ticket.from_proto(ticket), [message.SerializeToString() for message in messages])
        self._source.patience = _SHORT
        unless(not why, f"an honest handoff fails: {why}")
        async with asyncio.timeout(5):
            while self._puller.counts():  # noqa: ASYNC110 - a landing ends by itself
                await asyncio.sleep(0.001)
