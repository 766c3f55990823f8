"""Forged, truncated, replayed, oversized and cross-tenant messages at each door of a worker: refused, counted, logged
once however many come, and nothing is changed by them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from baton.errors import HandoffFailed
from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId, BlockRef, TransferId
from baton.v1 import transfer_pb2 as pb
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from kvtransfer.lifetimes import SourceState
from kvtransfer.ticket import Ticket
from kvtransfer.transports import frames
from kvtransfer.transports.base import Want
from tests.kvtransfer.rig import LAYOUT, Rig, fill, holds, make_rig, until
from tests.worker.rig import make_rig as make_worker
from tests.worker.test_admission import PROMPT, RECEIVE, hand_over, proto_id, ticket_for

TIMES = 30
BLOCKS = 3


@asynccontextmanager
async def offering() -> AsyncIterator[tuple[Rig, Ticket]]:
    """A source with one set that nobody has claimed. In the end it must be as it was, and an honest pull must work."""
    async with make_rig("tcp") as rig:
        id, blocks, ticket = rig.offer(BLOCKS)
        fill(rig.source, blocks)
        rig.ledger.seal(id, BLOCKS)
        yield rig, ticket
        assert rig.ledger.counts() == {SourceState.OFFERED: 1}
        assert not rig.permits.snapshot()
        assert not rig.ledger.draining
        assert rig.terminal == []
        rig.ledger.prefilled(id, 5)
        destination = rig.reserve(BLOCKS)
        await rig.puller.pull(ticket, id, destination, 0)
        assert holds(rig.destination, destination, blocks)


def refused(rig: Rig) -> float:
    return sum(
        sample.value
        for metric in rig.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "baton_kv_refused_total"
    )


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]


def claim_of(ticket: Ticket, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "transfer_id": ticket.transfer_id,
        "incarnation": ticket.incarnation,
        "request_id": ticket.id.request_id,
        "attempt": ticket.id.attempt,
        "layout_fingerprint": ticket.layout.fingerprint,
        "layout": ticket.layout.to_proto(),
        "worker_id": "decode-9",
    }
    return pb.PullRequest(claim=pb.Claim(**(fields | changes))).SerializeToString()


_PULLS: dict[str, Callable[[Ticket], bytes]] = {
    "a forged transfer id": lambda t: claim_of(t, transfer_id=bytes(16)),
    "another tenant's request": lambda t: claim_of(t, request_id="of-another-tenant"),
    "an earlier attempt": lambda t: claim_of(t, attempt=t.id.attempt + 1),
    "a ticket from before a restart": lambda t: claim_of(t, incarnation=t.incarnation - 1),
    "more blocks than there are": lambda t: claim_of(t, first_block=BLOCKS + 1),
    "an oversized name": lambda t: claim_of(t, worker_id="x" * 100_000),
    "too many transports": lambda t: claim_of(t, transports=["shm"] * 10_000),
    "a truncated message": lambda t: claim_of(t)[:-5],
    "no protobuf": lambda _: b"\xff" * 100,
    "a line for the log": lambda t: claim_of(t, request_id="x\n00:00:00 prefill-0 E all is lost"),
}


@pytest.mark.parametrize("what", _PULLS)
async def test_a_claim_that_is_not_right_changes_nothing(what: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with offering() as (rig, ticket), grpc.aio.insecure_channel(rig.address) as channel:
        pull = channel.stream_stream("/baton.v1.Transfer/Pull")
        for _ in range(TIMES):
            call = pull(timeout=5)
            await call.write(_PULLS[what](ticket))
            assert pb.PullResponse.FromString(await call.read()).WhichOneof("message") == "refused"
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        assert refused(rig) == TIMES
        assert len(logged(caplog)) == 1
        assert "\n" not in logged(caplog)[0]


@pytest.mark.parametrize("data", [
    pb.KeepRequest(transfer_id=bytes(16), incarnation=77).SerializeToString(),
    pb.KeepRequest(transfer_id=b"x" * 100_000, incarnation=77).SerializeToString(),
    b"\xff\xff",
    b"",
])  # fmt: skip
async def test_a_renewal_that_is_not_right_changes_nothing(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with offering() as (rig, _), grpc.aio.insecure_channel(rig.address) as channel:
        keep = channel.unary_unary("/baton.v1.Transfer/Keep")
        for _ in range(TIMES):
            assert pb.KeepResponse.FromString(await keep(data, timeout=5)).WhichOneof("message") == "refused"
        assert refused(rig) == TIMES
        assert len(logged(caplog)) == 1


async def test_what_was_released_can_not_be_replayed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with make_rig("tcp") as rig, grpc.aio.insecure_channel(rig.address) as channel:
        id, blocks, ticket = rig.offer(BLOCKS)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 5)
        await rig.puller.pull(ticket, id, rig.reserve(BLOCKS), 0)
        await until(lambda: rig.terminal == [id])
        caplog.clear()
        pull = channel.stream_stream("/baton.v1.Transfer/Pull")
        for _ in range(TIMES):
            call = pull(timeout=5)
            await call.write(claim_of(ticket, worker_id="decode-0"))
            said = pb.PullResponse.FromString(await call.read()).refused
            assert said.reason == pb.REFUSAL_REASON_UNKNOWN_TRANSFER
            assert "was released" in said.message
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        assert rig.terminal == [id]
        assert rig.ledger.counts() == {}
        assert refused(rig) == TIMES
        assert len(logged(caplog)) == 1


def _wanted(ticket: Ticket, wants: Sequence[Want], transfer_id: TransferId | None = None) -> bytes:
    return frames.pack_request(transfer_id or ticket.transfer_id, LAYOUT.block_bytes, wants)


_FRAMES: dict[str, Callable[[Ticket], bytes]] = {
    "an unclaimed set": lambda t: _wanted(t, [Want(t.blocks[0].index, t.blocks[0].generation, 0)]),
    "a forged transfer id": lambda t: _wanted(t, [Want(2, 1, 0)], TransferId(bytes(16))),
    "garbage": lambda _: b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half a header": lambda t: _wanted(t, [Want(2, 1, 0)])[:10],
    "half a request": lambda t: _wanted(t, [Want(2, 1, 0)] * 4)[:-9],
    "too many blocks": lambda t: _wanted(t, [Want(2, 1, 0)] * 4097),
    "blocks of another size": lambda t: frames.pack_request(t.transfer_id, 1 << 40, [Want(2, 1, 0)]),
}


@pytest.mark.parametrize("what", _FRAMES)
async def test_a_frame_that_is_not_right_gets_no_bytes(what: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with offering() as (rig, ticket):
        for _ in range(TIMES):
            got = await asyncio.to_thread(_exchange, rig, _FRAMES[what](ticket))
            assert len(got) <= frames.REPLY.size
        assert refused(rig) == TIMES
        assert len(logged(caplog)) == 1


async def test_blocks_that_another_set_has_are_not_given_out(caplog: pytest.LogCaptureFixture) -> None:
    """Who may pull one set learns nothing of a neighbour's blocks, another tenant's perhaps."""
    caplog.set_level(logging.INFO)
    async with make_rig("tcp") as rig, grpc.aio.insecure_channel(rig.address) as channel:
        id, blocks, ticket = rig.offer(BLOCKS)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 5)
        call = channel.stream_stream("/baton.v1.Transfer/Pull")(timeout=5)
        await call.write(claim_of(ticket))
        assert pb.PullResponse.FromString(await call.read()).WhichOneof("message") == "claimed"
        for _ in range(TIMES):
            got = await asyncio.to_thread(_exchange, rig, _wanted(ticket, [Want(20, 0, 0)]))
            assert got[frames.REPLY.size :] == bytes([frames.BlockStatus.REFUSED] * 2)
        assert refused(rig) == TIMES
        assert len(logged(caplog)) == 1
        call.cancel()


_TICKETS: dict[str, Callable[[Ticket], Ticket]] = {
    "another tenant's request": lambda t: replace(t, id=AttemptId("of-another-tenant", 0)),
    "another tenant's blocks": lambda t: replace(t, blocks=_salted(t.blocks)),
    "another attempt": lambda t: replace(t, id=AttemptId(t.id.request_id, 7)),
    "fewer blocks": lambda t: replace(t, blocks=t.blocks[:-1]),
    "another model": lambda t: replace(t, layout=replace(t.layout, model_fingerprint=b"another")),
}


def _salted(blocks: Sequence[BlockRef]) -> tuple[BlockRef, ...]:
    """The same tokens under another tenant's salt."""
    hashes = block_hashes(root_hash(b"m", salt=b"salt"), range(16 * len(blocks)), 16)
    return tuple(replace(block, hash=other) for block, other in zip(blocks, hashes, strict=True))


@pytest.mark.parametrize("what", _TICKETS)
async def test_a_ticket_that_is_not_for_what_was_reserved_is_not_pulled(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvtransfer.refusal")
    async with offering() as (rig, ticket):
        for _ in range(TIMES):
            with pytest.raises(HandoffFailed):
                await rig.puller.pull(_TICKETS[what](ticket), ticket.id, rig.reserve(BLOCKS), 0)
        assert refused(rig) == TIMES
        assert rig.puller.counts() == {}
        assert len([r for r in caplog.records if r.name == "kvtransfer.refusal"]) == 1


def _spoilt(**changes: Any) -> pb.Ticket:
    ticket = ticket_for(PROMPT)
    for name, value in changes.items():
        setattr(ticket, name, value)
    return ticket


@pytest.mark.parametrize("ticket", [
    _spoilt(transfer_id=b"short"),
    _spoilt(num_tokens=10_000),
    _spoilt(address="nowhere"),
    _spoilt(lease_ms=4_000_000_000),
    _spoilt(worker_id="x" * 100_000),
    pb.Ticket(),
])  # fmt: skip
async def test_a_ticket_that_can_not_be_ends_its_request_alone(
    ticket: pb.Ticket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rig = make_worker(Admission)
    for attempt in range(TIMES):
        rig.submit(RECEIVE, PROMPT, attempt)
        rig.say(handoff=worker_pb2.Handoff(id=proto_id(attempt), ticket=ticket))
    await rig.settle()
    assert [e.ended.reason for e in rig.events("ended")] == [worker_pb2.END_REASON_HANDOFF_FAILED] * TIMES
    assert rig.metrics.registry.get_sample_value("baton_stale_messages_total", {"kind": "malformed"}) == TIMES
    assert len(logged(caplog)) == 1
    rig.assert_idle()


@pytest.mark.parametrize("message", [
    worker_pb2.SessionRequest(),
    worker_pb2.SessionRequest(handoff=worker_pb2.Handoff(id=proto_id(3), ticket=ticket_for(PROMPT))),
    worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(id=proto_id(3))),
], ids=["unknown", "handoff", "cancel"])  # fmt: skip
async def test_messages_of_attempts_that_are_not_here_change_nothing(
    message: worker_pb2.SessionRequest, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rig = make_worker(Admission)
    rig.submit(RECEIVE, PROMPT)
    for _ in range(TIMES):
        rig.core.receive(rig.session, message)
    kind = request.node.callspec.id
    assert rig.metrics.registry.get_sample_value("baton_stale_messages_total", {"kind": kind}) == TIMES
    assert len(logged(caplog)) == 1
    assert len(rig.core.open_attempts) == 1
    assert not rig.commands


async def test_a_repeated_submit_and_a_repeated_handoff_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig = make_worker(Admission)
    rig.submit(RECEIVE, PROMPT)
    hand_over(rig)
    commands = len(rig.commands)
    for _ in range(TIMES):
        rig.submit(RECEIVE, PROMPT)
        hand_over(rig)
    assert len(rig.commands) == commands
    assert rig.metrics.registry.get_sample_value("baton_stale_messages_total", {"kind": "submit"}) == TIMES
    assert len(logged(caplog)) == 1


def _exchange(rig: Rig, data: bytes) -> bytes:
    """Says it, hangs up, and returns all that comes."""
    address = rig.data_server.endpoint().address.decode().rpartition(":")
    with socket.create_connection((address[0], int(address[2])), timeout=5) as sock:
        got = b""
        with contextlib.suppress(OSError):  # it hung up before it had read all
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                got += piece
        return got
