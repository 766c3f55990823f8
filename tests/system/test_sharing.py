"""What one worker holds is another's: prefixes that are fetched, streams that move away from a worker that drains."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from baton.sampling import SamplingParams
from tests.system.conftest import Oracle, tokens
from tests.system.harness import System, system, until
from tests.system.test_faults import Streams, check_exact

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    log = tmp_path_factory.mktemp("sharing") / "log"
    flags = ("--kv-blocks=2048", "--prefill=1", "--decode=2", "--local-prefill-tokens=0", "--fetch-prefix-tokens=32")
    async with system(checkpoint("llama"), log, *flags) as started:
        yield started


async def test_the_second_turn_of_a_conversation_is_not_computed_by_the_one_who_did_not_write_the_first(
    running: System, oracle: Oracle
) -> None:
    rng = random.Random(1)
    turn = tokens(rng, 100)
    async with running.client() as client:

        async def fetched() -> bool:
            """Once the directory has heard of the answer's blocks."""
            prompt = (*turn, *first.token_ids, *tokens(rng, 5))
            answer = await client.answer(prompt, SamplingParams(max_tokens=10, ignore_eos=True), timeout=60)
            oracle.check("llama", prompt, answer.token_ids)
            assert answer.prefill_worker != answer.decode_worker
            if not await running.metric("baton_prefix_fetches_total", outcome="landed"):
                return False
            assert answer.usage["cached_tokens"] >= 96 + 32, "all that it computed itself were 96"
            return True

        first = await client.answer(turn, SamplingParams(max_tokens=150, ignore_eos=True), timeout=60)
        await until(fetched, 30, lambda: "the prefill worker never fetched what the decode worker wrote")
    await running.assert_idle()


async def test_streams_move_away_from_a_worker_that_drains_and_lose_nothing(running: System, oracle: Oracle) -> None:
    streams = Streams(running, 5, SamplingParams(max_tokens=1500, ignore_eos=True))
    work = asyncio.create_task(streams.run())
    await streams.flowing()
    fetched = await running.metric("baton_prefix_fetches_total", outcome="landed")
    pid = (await running.worker("decode"))["pid"]
    os.kill(pid, signal.SIGTERM)
    await work
    check_exact(streams, oracle, 1500)
    assert streams.resumes == 0, "a drain loses nothing"
    moved = await running.metric("baton_requests_moved_total")
    assert moved > 0
    assert await running.metric("baton_prefix_fetches_total", outcome="landed") >= fetched + moved

    async def came_back() -> bool:
        workers = await running.workers()
        return len(workers) == 3 and all(w["state"] == "ready" and w["pid"] != pid for w in workers)

    await until(came_back, 60, lambda: "the worker that drained was not started again")
    await running.assert_idle()
