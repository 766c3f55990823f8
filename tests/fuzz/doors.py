"""The doors at which a worker hears others, each with what is valid there and with what must hold whatever comes.

`knock` says one damaged thing, or a few that belong together, to the real code behind a door, and raises Broken where
that took what it must refuse, or changed by what it refused. `rest` asks whether anything is held, and whether what is
honest still does its work. The larger doors have files of their own.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from baton.errors import HandoffFailed
from baton.ids import TransferId
from baton.v1 import transfer_pb2 as pb
from kvtransfer.ticket import MAX_BLOCKS, MAX_LEASE_SECONDS, Ticket
from kvtransfer.transports import frames
from kvtransfer.transports.base import MAX_FETCH_BLOCKS, Endpoint, Want
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus
from kvtransfer.transports.shm import shm_endpoint
from tests.fuzz.mutator import Mutator
from tests.kvtransfer.rig import LAYOUT, Rig

BLOCKS = 3


class Broken(AssertionError):
    """What must hold does not."""


class Door(Protocol):
    name: str

    async def knock(self, mutator: Mutator) -> None: ...

    async def rest(self) -> None: ...


def unless(right: bool, why: str) -> None:
    if not right:
        raise Broken(why)


def read(kind: Any, wire: bytes) -> Any:
    """As a worker's gRPC server does: see worker/unreadable.py."""
    try:
        return kind.FromString(wire)
    except DecodeError:
        return kind()


class TicketDoor:
    """A ticket on its way into a decode worker."""

    name = "tickets"

    def __init__(self, rig: Rig) -> None:
        _, _, ticket = rig.offer(BLOCKS)
        rig.ledger.abort(ticket.id)
        self._right = ticket.to_proto()

    async def knock(self, mutator: Mutator) -> None:
        message = read(pb.Ticket, mutator.wire(self._right))
        try:
            ticket = Ticket.from_proto(message)
        except HandoffFailed:
            return
        unless(len(ticket.transfer_id) == 16, "a secret of any size")
        unless(0 < len(ticket.blocks) <= min(MAX_BLOCKS, ticket.num_tokens), "any number of blocks")
        unless(len({b.index for b in ticket.blocks}) == len(ticket.blocks), "a block twice")
        unless(all(len(b.hash) == 32 for b in ticket.blocks), "a hash of any size")
        unless(0 < ticket.lease_seconds <= MAX_LEASE_SECONDS, "a lease of any length")
        unless(max(map(len, (ticket.worker_id, ticket.address, ticket.id.request_id))) <= 512, "names of any size")
        unless(Ticket.from_proto(ticket.to_proto()) == ticket, "a ticket that does not survive the wire")

    async def rest(self) -> None:
        unless(Ticket.from_proto(self._right).to_proto() == self._right, "a valid ticket is not taken as it is")


class FrameDoor:
    """The bytes of the tcp transport, parsed."""

    name = "frames"

    async def knock(self, mutator: Mutator) -> None:
        rng = mutator.rng
        count = rng.randint(1, 5)
        wants = [Want(rng.randrange(64), rng.randrange(9), 0) for _ in range(count)]
        request = frames.pack_request(TransferId(rng.randbytes(16)), LAYOUT.block_bytes, wants)
        reply = frames.pack_reply(rng.choice(list(ReplyStatus)), count) + rng.randbytes(count)
        with contextlib.suppress(FrameError):
            header = mutator.data(request).ljust(frames.REQUEST.size, b"\0")[: frames.REQUEST.size]
            parsed = frames.parse_request(header)
            unless(0 < parsed.num_blocks <= MAX_FETCH_BLOCKS, "a request for any number of blocks")
        damaged = mutator.data(reply).ljust(frames.REPLY.size, b"\0")
        with contextlib.suppress(FrameError):
            unless(frames.parse_reply(damaged[: frames.REPLY.size], count) in ReplyStatus, "a reply of any status")
        with contextlib.suppress(FrameError):
            statuses = frames.parse_statuses(damaged[frames.REPLY.size :])
            unless(set(statuses) <= set(BlockStatus), "a block of any status")

    async def rest(self) -> None:
        pass


class AddressDoor:
    """Where a source says its bytes are."""

    name = "addresses"

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._right = [shm_endpoint(rig.source), rig.data_server.endpoint(), Endpoint("fake", b"source")]

    async def knock(self, mutator: Mutator) -> None:
        rng = mutator.rng
        endpoint = rng.choice(self._right)
        damaged = endpoint._replace(address=mutator.data(endpoint.address))
        if damaged.address == endpoint.address:
            return
        with contextlib.suppress(HandoffFailed):
            name, connection = await self._rig.connector.open([damaged])
            unless(name != "shm" or damaged.address.endswith(self._rig.source.nonce), "opened memory of another name")
            await connection.close()

    async def rest(self) -> None:
        name, _ = await self._rig.connector.open(self._right)
        unless(name == "shm", "an honest address does not open")
