"""The Pull stream as a puller meets it: what is refused, why, and that nothing changes by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer.lifetimes import SourceState
from kvtransfer.ticket import Ticket
from tests.kvtransfer.rig import LAYOUT, Rig, fill, make_rig, until


class Stream:
    """A puller's side, message by message."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def say(self, *messages: pb.PullRequest) -> None:
        for message in messages:
            await self.call.write(message)

    async def hear(self) -> pb.PullResponse | None:
        async with asyncio.timeout(5):
            message = await self.call.read()
        return message if isinstance(message, pb.PullResponse) else None

    async def ends(self) -> bool:
        """Whether nothing comes any more once this side has hung up."""
        await self.call.done_writing()
        return await self.hear() is None


@asynccontextmanager
async def dial(rig: Rig) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        yield Stream(transfer_pb2_grpc.TransferStub(channel).Pull())


def claim(ticket: Ticket, **changes: Any) -> pb.PullRequest:
    fields: dict[str, Any] = {
        "transfer_id": ticket.transfer_id,
        "incarnation": ticket.incarnation,
        "request_id": ticket.id.request_id,
        "attempt": ticket.id.attempt,
        "layout_fingerprint": ticket.layout.fingerprint,
        "layout": ticket.layout.to_proto(),
        "worker_id": "decode-0",
    }
    return pb.PullRequest(claim=pb.Claim(**(fields | changes)))


DEEPER = replace(LAYOUT, num_layers=3)
RENEW, RELEASE = pb.PullRequest(renew=pb.Renew()), pb.PullRequest(release=pb.Release())


async def test_a_whole_stream() -> None:
    async with make_rig() as rig, dial(rig) as stream:
        id, blocks, ticket = rig.offer(3)
        fill(rig.source, blocks)
        await stream.say(claim(ticket, first_block=1))
        claimed = await stream.hear()
        assert claimed is not None
        assert [e.transport for e in claimed.claimed.endpoints] == ["shm", "tcp", "fake"]
        assert claimed.claimed.lease_ms == 5000
        rig.ledger.seal(id, 2)
        sealed = await stream.hear()
        assert sealed is not None
        assert [b.position for b in sealed.sealed.blocks] == [1]
        await stream.say(RENEW)
        renewed = await stream.hear()
        assert renewed is not None
        assert renewed.renewed.lease_ms == 5000
        rig.ledger.prefilled(id, 31)
        assert [m.WhichOneof("message") for m in (await stream.hear(), await stream.hear()) if m] == [
            "sealed",
            "prefilled",
        ]
        await stream.say(RELEASE)
        assert await stream.hear() is None
        assert rig.terminal == [id]


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"transfer_id": b"x"}, "MALFORMED", "transfer_id is 1 bytes long"),
        ({"layout_fingerprint": b""}, "MALFORMED", "layout_fingerprint is 0 bytes long"),
        ({"worker_id": ""}, "MALFORMED", "worker_id is 0 characters long"),
        ({"transports": ["shm"] * 17}, "MALFORMED", "at most 16"),
        ({"first_block": 4}, "MALFORMED", "first_block is 4; the set has 3 blocks"),
        ({"transfer_id": bytes(16)}, "UNKNOWN_TRANSFER", "no such block set"),
        ({"attempt": 9}, "UNKNOWN_TRANSFER", "the claim is for req-1#9, the block set is of req-1#0"),
        ({"incarnation": 5}, "STALE_INCARNATION", "the ticket is of incarnation 5, this is 77"),
        ({"layout": pb.Layout()}, "MALFORMED", "layout.num_layers is 0"),
        ({"layout_fingerprint": b"z" * 16}, "LAYOUT_MISMATCH", "7a7a7a"),
        (
            {"layout_fingerprint": DEEPER.fingerprint, "layout": DEEPER.to_proto()},
            "LAYOUT_MISMATCH",
            "the number of layers is 2 at the source, 3 at the destination",
        ),
    ],
)
async def test_a_wrong_claim_is_refused_and_counted_and_the_offer_stands(
    changes: dict[str, Any], reason: str, said: str
) -> None:
    async with make_rig() as rig:
        _, _, ticket = rig.offer(3)
        async with dial(rig) as stream:
            await stream.say(claim(ticket, **changes))
            refusal = await stream.hear()
            assert refusal is not None
            assert pb.RefusalReason.Name(refusal.refused.reason) == f"REFUSAL_REASON_{reason}"
            assert said in refusal.refused.message
            assert await stream.ends()
        assert rig.ledger.counts() == {SourceState.OFFERED: 1}
        assert rig.metric("baton_kv_refused_total", reason=reason.lower()) == 1


@pytest.mark.parametrize("first", [RENEW, RELEASE, pb.PullRequest()])
async def test_a_stream_must_begin_with_a_claim(first: pb.PullRequest) -> None:
    async with make_rig() as rig, dial(rig) as stream:
        await stream.say(first)
        refusal = await stream.hear()
        assert refusal is not None
        assert refusal.refused.reason == pb.REFUSAL_REASON_MALFORMED
        assert "it must be a claim" in refusal.refused.message


async def test_a_stream_that_says_nothing_is_ended() -> None:
    async with make_rig(claim_seconds=0.05) as rig, dial(rig) as stream:
        refusal = await stream.hear()
        assert refusal is not None
        assert "no claim came within 0.05 s" in refusal.refused.message


@pytest.mark.parametrize("second", ["claim", "nothing"])
async def test_a_claimant_that_breaks_the_protocol_is_refused_and_keeps_its_lease(second: str) -> None:
    async with make_rig() as rig, dial(rig) as stream:
        _, _, ticket = rig.offer(3)
        await stream.say(claim(ticket))
        assert await stream.hear() is not None
        await stream.say(claim(ticket) if second == "claim" else pb.PullRequest())
        refusal = await stream.hear()
        assert refusal is not None
        assert "it must be a renewal or the release" in refusal.refused.message
        assert await stream.ends()
        assert rig.ledger.counts() == {SourceState.CLAIMED: 1}


async def test_a_claim_can_be_made_again_after_a_broken_stream() -> None:
    async with make_rig() as rig:
        id, blocks, ticket = rig.offer(3)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 9)
        async with dial(rig) as stream:
            await stream.say(claim(ticket))
            assert await stream.hear() is not None
            stream.call.cancel()
        async with dial(rig) as stream:
            await stream.say(claim(ticket, worker_id="decode-1"))
            refusal = await stream.hear()
            assert refusal is not None
            assert refusal.refused.reason == pb.REFUSAL_REASON_ALREADY_CLAIMED
        async with dial(rig) as stream:
            await stream.say(claim(ticket))
            kinds = [m.WhichOneof("message") for m in [await stream.hear() for _ in range(3)] if m]
            assert kinds == ["claimed", "sealed", "prefilled"]
            await stream.say(RELEASE)
            assert await stream.hear() is None
        assert rig.terminal == [id]


async def test_an_abort_reaches_the_puller_with_its_reason() -> None:
    async with make_rig() as rig, dial(rig) as stream:
        id, _, ticket = rig.offer(3)
        await stream.say(claim(ticket))
        assert await stream.hear() is not None
        rig.ledger.abort(id)
        refusal = await stream.hear()
        assert refusal is not None
        assert refusal.refused.reason == pb.REFUSAL_REASON_ABORTED


async def test_a_puller_that_does_not_read_does_not_stop_the_source() -> None:
    async with make_rig() as rig, dial(rig) as stream:
        id, _, ticket = rig.offer(1)
        await stream.say(claim(ticket))
        await until(lambda: rig.ledger.counts() == {SourceState.CLAIMED: 1})
        await stream.say(*[RENEW] * 2000)
        await stream.say(RELEASE)
        async with asyncio.timeout(5):
            while await stream.hear() is not None:
                pass
        assert rig.terminal == [id]


MESSAGES = st.lists(
    st.one_of(
        st.just(RENEW),
        st.just(pb.PullRequest()),
        st.builds(
            lambda **fields: pb.PullRequest(claim=pb.Claim(**fields)),
            transfer_id=st.binary(max_size=17),
            incarnation=st.sampled_from([0, 77]),
            layout_fingerprint=st.binary(max_size=17),
            first_block=st.integers(0, 2**32 - 1),
            worker_id=st.text(max_size=5),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=5, deadline=None)
@given(streams=st.lists(MESSAGES, min_size=5, max_size=10))
def test_no_stream_of_messages_changes_an_offer_without_its_transfer_id(
    streams: Sequence[Sequence[pb.PullRequest]],
) -> None:
    async def run() -> None:
        async with make_rig(claim_seconds=0.2) as rig:
            _, _, _ticket = rig.offer(3)
            for messages in streams:
                async with dial(rig) as stream:
                    for message in messages:
                        await stream.say(message)
                    refusal = await stream.hear()
                    assert refusal is not None
                    assert refusal.WhichOneof("message") == "refused"
                    assert await stream.ends()
            assert rig.ledger.counts() == {SourceState.OFFERED: 1}

    asyncio.run(run())
