"""Between proto messages and what the worker's parts call the same things."""

from __future__ import annotations

from dataclasses import dataclass

from baton.ids import AttemptId, Incarnation, WorkerId
from baton.v1 import worker_pb2
from kvtransfer.landing import Landed
from kvtransfer.ticket import MAX_ADDRESS, MAX_BLOCKS, MAX_WORKER_ID, Ticket, check_name


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Who is said to hold the beginning of a prompt: see `PrefixSource` in worker.proto."""

    worker_id: WorkerId
    address: str
    incarnation: Incarnation
    num_blocks: int
    ticket: Ticket | None

    @classmethod
    def from_proto(cls, message: worker_pb2.PrefixSource) -> PrefixSource:
        """Raises TransferRefused, naming what is wrong."""
        if message.HasField("ticket"):
            ticket = Ticket.from_proto(message.ticket)
            return cls(ticket.worker_id, ticket.address, ticket.incarnation, len(ticket.blocks), ticket)
        check_name("worker_id", message.worker_id, MAX_WORKER_ID)
        check_name("address", message.address, MAX_ADDRESS)
        num_blocks = min(message.num_blocks, MAX_BLOCKS)
        return cls(WorkerId(message.worker_id), message.address, Incarnation(message.incarnation), num_blocks, None)


def attempt_id(message: worker_pb2.AttemptId) -> AttemptId:
    return AttemptId(message.request_id, message.attempt)


def proto_id(request_id: AttemptId) -> worker_pb2.AttemptId:
    return worker_pb2.AttemptId(request_id=request_id.request_id, attempt=request_id.attempt)


def ticket_event(request_id: AttemptId, ticket: Ticket) -> worker_pb2.RequestEvent:
    return worker_pb2.RequestEvent(id=proto_id(request_id), ticket=ticket.to_proto())


def landed_event(request_id: AttemptId, landed: Landed) -> worker_pb2.RequestEvent:
    return worker_pb2.RequestEvent(
        id=proto_id(request_id),
        landed=worker_pb2.Landed(
            seconds=landed.seconds, blocks=landed.blocks, bytes=landed.bytes, transport=landed.transport
        ),
    )
