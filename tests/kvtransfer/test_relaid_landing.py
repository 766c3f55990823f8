"""Landings of blocks that the source lays out differently, over real transports: what comes in is what was computed,
and what can't be matched is refused before anything is claimed."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from baton.errors import LayoutMismatch, TransferRefused, VerifyFailed
from baton.layout import KVLayout
from kvtransfer import staging
from kvtransfer.lifetimes import DestinationState, SourceState
from kvtransfer.memory import HostMemory
from kvtransfer.reservation import Prompt
from kvtransfer.threads import Threads
from kvtransfer.transports.chooser import Connector
from tests.kvtransfer.relaid_rig import ID, NUM_TOKENS, PROMPT, TRANSPORTS, make_pair, of
from tests.kvtransfer.rig import until
from tests.kvtransfer.test_relayout import MODEL, blocks_of

DIFFERENT = [
    pytest.param(of(block_size=8), of(block_size=16), id="8 to 16"),
    pytest.param(of(block_size=16), of(block_size=32), id="16 to 32"),
    pytest.param(of(block_size=32), of(block_size=16), id="32 to 16"),
    pytest.param(of(block_size=12), of(block_size=16), id="12 to 16"),
    pytest.param(of(dtype="float32"), of(dtype="bfloat16"), id="float32 to bfloat16"),
    pytest.param(of(dtype="bfloat16"), of(dtype="float32"), id="bfloat16 to float32"),
    pytest.param(of(dtype="float16", block_size=8), of(dtype="bfloat16"), id="float16 of 8 to bfloat16 of 16"),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("source", "destination"), DIFFERENT)
async def test_blocks_are_re_laid_while_the_source_still_computes(
    transport: str, source: KVLayout, destination: KVLayout
) -> None:
    async with make_pair(transport, source, destination) as pair:
        landing = pair.land()
        for share in (0.3, 0.7):
            pair.seal(share)
            sealed = int(blocks_of(NUM_TOKENS, source) * share) * source.block_bytes
            await until(lambda sealed=sealed: pair.metric("baton_kv_relaid_bytes_total") == sealed)
        assert landing.state is DestinationState.LANDING
        pair.prefilled()
        landed = await landing.done()
        blocks = blocks_of(NUM_TOKENS, source)
        assert (landed.first_token, landed.blocks, landed.transport) == (4711, blocks, transport)
        assert landed.bytes == blocks * source.block_bytes
        assert landed.own_dtype == (source.dtype == destination.dtype)
        assert pair.holds()
        assert pair.metric("baton_kv_relaid_bytes_total") == landed.bytes
        await pair.idle()
        assert pair.sources[0].terminal == [ID]


async def test_equal_layouts_are_not_staged() -> None:
    async with make_pair("shm", MODEL, MODEL) as pair:
        landing = pair.land()
        pair.prefilled()
        assert (await landing.done()).own_dtype
        assert pair.holds()
        assert not pair.puller._arrivals._stagings._by_size
        assert pair.metric("baton_kv_relaid_bytes_total") == 0


@pytest.mark.parametrize(("first_missing", "moved"), [(1, 9), (2, 8), (5, 5), (8, 2), (9, 0)])
async def test_of_a_block_that_straddles_the_cached_prefix_only_what_is_missing_is_used(
    first_missing: int, moved: int
) -> None:
    async with make_pair("shm", of(block_size=14), of(block_size=15)) as pair:
        landing = pair.land(first_missing)
        pair.prefilled()
        assert (await landing.done()).blocks == moved
        assert pair.holds(first_missing)
        await pair.idle()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 3}, "the number of layers is 2 at the source, 3 at the destination"),
        ({"num_kv_heads": 8}, "the number of KV heads is 4 at the source, 8 at the destination"),
        ({"head_dim": 4}, "the width of a head is 3 at the source, 4 at the destination"),
        ({"model_fingerprint": b"n" * 16}, "the model's fingerprint is 6d6d6d6d6d6d6d6d at the source, 6e6e"),
    ],
)
async def test_what_cannot_be_matched_is_refused_by_name_before_anything_is_claimed(
    changes: dict[str, Any], said: str
) -> None:
    async with make_pair("shm", MODEL, of(**changes)) as pair:
        with pytest.raises(LayoutMismatch, match=said):
            await pair.land().done()
        assert pair.sources[0].ledger.counts() == {SourceState.OFFERED: 1}


@pytest.mark.parametrize(
    "prompt",
    [
        replace(PROMPT, salt=b"another tenant"),
        replace(PROMPT, token_ids=(*PROMPT.token_ids[:-1], 999)),
        replace(PROMPT, token_ids=PROMPT.token_ids[:-8]),
    ],
)
async def test_blocks_of_another_prompt_or_tenant_are_not_pulled(prompt: Prompt) -> None:
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        with pytest.raises(VerifyFailed, match=r"is offered as|the prompt has 16"):
            await pair.land(prompt=prompt).done()
        assert pair.sources[0].ledger.counts() == {SourceState.OFFERED: 1}


async def test_blocks_of_another_size_need_the_prompt_to_be_told_by() -> None:
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        with pytest.raises(LayoutMismatch, match="have 8 tokens, these 16, and the prompt"):
            await pair.land(prompt=None).done()


async def test_blocks_too_large_to_stage_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STAGING_BYTES", 1000)
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        with pytest.raises(TransferRefused, match=r"has 1536 bytes, and can't be re-laid: at most 1000 are staged"):
            await pair.land().done()


async def test_stagings_are_few_and_the_longest_unused_makes_room() -> None:
    memory = HostMemory.create(1, MODEL.block_bytes)
    threads = Threads.create()
    stagings = staging.Stagings(Connector(memory, threads))
    for block_size in range(1, 20):
        async with stagings.use(of(block_size=block_size)) as one:
            assert one.memory.block_bytes == of(block_size=block_size).block_bytes
            assert len(stagings._by_size) <= staging.MAX_STAGINGS
    async with AsyncExitStack() as stack:
        for block_size in range(1, 5):
            await stack.enter_async_context(stagings.use(of(block_size=block_size)))
        async with stagings.use(of(block_size=2)):
            pass
        with pytest.raises(TransferRefused, match="blocks of 4 other sizes are being re-laid"):
            await stack.enter_async_context(stagings.use(of(block_size=9)))
    async with stagings.use(of(block_size=9)):
        assert of(block_size=1).block_bytes not in stagings._by_size, "the longest unused"
    await stagings.close()
    threads.close()
