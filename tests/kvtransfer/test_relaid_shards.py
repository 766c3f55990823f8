"""Landings of shares of the heads: any degree of tensor parallelism lands in any other, and all of them or none."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import LayoutMismatch, PeerLost, VerifyFailed
from baton.ids import AttemptId
from kvtransfer.lifetimes import DestinationState, SourceState
from tests.kvtransfer.relaid_rig import ID, NUM_TOKENS, make_pair, of
from tests.kvtransfer.rig import until
from tests.kvtransfer.test_relayout import MODEL, blocks_of, ranks


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("to_size", [1, 2, 4])
@pytest.mark.parametrize("from_size", [1, 2, 4])
async def test_any_degree_of_tensor_parallelism_lands_in_any_other(
    from_size: int, to_size: int, transport: str
) -> None:
    """Each rank of the destination pulls from each rank of the source that holds heads of its own."""
    source, destination = of(tp_size=from_size, block_size=8), of(tp_size=to_size)
    for layout in ranks(destination):
        async with make_pair(transport, source, layout) as pair:
            keep = [bool(set(rank.heads) & set(layout.heads)) for rank in pair.layouts]
            for name in ("sources", "layouts", "tickets"):
                setattr(pair, name, [item for item, kept in zip(getattr(pair, name), keep, strict=True) if kept])
            landing = pair.land()
            pair.prefilled()
            landed = await landing.done()
            assert landed.transport == transport
            assert landed.blocks == blocks_of(NUM_TOKENS, source) * len(pair.sources)
            assert pair.holds()
            await pair.idle()


async def test_one_source_gives_each_rank_its_heads_under_a_ticket_of_its_own() -> None:
    source = of(block_size=8)
    one, two = ranks(of(tp_size=2))
    async with make_pair("tcp", source, one) as pair, make_pair("tcp", source, two) as other:
        rank = AttemptId("req-1.1", 0)
        landings = [pair.land()]
        pair.offer(rank)
        other.tickets = pair.tickets
        landings.append(other.land(id=rank))
        pair.prefilled(ID)
        pair.prefilled(rank)
        for landing in landings:
            await landing.done()
        assert pair.holds()
        assert other.holds()
        assert await pair.sources[0].ledger.drain(10)


async def test_a_landing_of_shards_commits_only_when_all_of_them_have_landed() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land()
        pair.sources[0].ledger.prefilled(ID, 1)
        await until(lambda: pair.metric("baton_kv_relaid_bytes_total") == 9 * pair.layouts[0].block_bytes)
        await asyncio.sleep(0.05)
        assert landing.state is DestinationState.LANDING
        pair.sources[1].ledger.prefilled(ID, 1)
        await landing.done()
        assert pair.holds()
        await pair.idle()


async def test_the_lease_of_a_shard_that_is_done_is_kept_while_another_computes() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL, lease_seconds=0.15) as pair:
        reapers = [asyncio.create_task(source.ledger.run_reaper()) for source in pair.sources]
        landing = pair.land()
        pair.sources[0].ledger.prefilled(ID, 1)
        await asyncio.sleep(0.6)  # four leases
        assert [source.ledger.counts() for source in pair.sources] == [{SourceState.CLAIMED: 1}] * 2
        pair.sources[1].ledger.prefilled(ID, 1)
        await landing.done()
        for reaper in reapers:
            reaper.cancel()


async def test_a_shard_that_is_lost_ends_the_landing_and_frees_the_other() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land()
        pair.seal()
        await until(lambda: pair.metric("baton_kv_relaid_bytes_total") > 0)
        await pair.sources[1].server.stop(None)
        with pytest.raises(PeerLost, match="prefill-1 at 127"):
            await landing.done()
        await landing.drained()
        assert landing.state is DestinationState.FREE
        assert await pair.sources[0].ledger.drain(10)


async def test_shards_that_drew_different_tokens_are_not_committed() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land()
        for number, source in enumerate(pair.sources):
            source.ledger.prefilled(ID, number)
        with pytest.raises(VerifyFailed, match=r"different first tokens: 0, 1"):
            await landing.done()
        await pair.idle()


async def test_heads_that_no_ticket_offers_are_named_before_anything_is_claimed() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land(shards=[])
        with pytest.raises(LayoutMismatch, match=r"decode-0 can't use the blocks of prefill-0 at 127.*KV head 2"):
            await landing.done()
        assert pair.sources[0].ledger.counts() == {SourceState.OFFERED: 1}
