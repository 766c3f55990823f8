"""Invariant 6: kill -9 of any process in mid-stream, and every stream ends token-exact; afterwards nothing is held."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from baton import model_in_the_box
from baton.client import Client
from baton.sampling import SamplingParams
from tests.system.conftest import Oracle, tokens
from tests.system.harness import System, children, system, until
from tests.system.recall import Recall, Recalled, recall, recall_questions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OUTPUT = 160
STREAMS = 16


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    log = tmp_path_factory.mktemp("faults") / "log"
    async with system(checkpoint("llama"), log, "--kv-blocks=512", "--prefill=1", "--decode=2") as started:
        yield started


class Streams:
    """16 open streams; `flowing` is set when each has had some tokens and none is near its end."""

    def __init__(self, running: System, seed: int, sampling: SamplingParams, *, long_prompts: bool = False) -> None:
        rng = random.Random(seed)
        least, most = (1200, 2000) if long_prompts else (70, 400)
        self.prompts = [tokens(rng, rng.randrange(least, most)) for _ in range(STREAMS)]
        self.got: list[list[int]] = [[] for _ in self.prompts]
        self.resumes = 0
        self._sampling = sampling
        self._running = running

    async def run(self) -> None:
        async with self._running.client() as client:
            await asyncio.gather(*(self._stream(client, number) for number in range(STREAMS)))

    async def _stream(self, client: Client, number: int) -> None:
        async for part in client.generate(self.prompts[number], self._sampling, timeout=120):
            self.got[number] += part.token_ids
            if part.HasField("finished"):
                self.resumes += part.finished.timings.resumes

    async def flowing(self, least: int = 1) -> None:
        async def all_begun() -> bool:
            return all(len(got) >= least for got in self.got)

        await until(all_begun, 60, lambda: f"tokens so far: {[len(got) for got in self.got]}")


GREEDY = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)


def check_exact(streams: Streams, oracle: Oracle, count: int = OUTPUT) -> None:
    for prompt, got in zip(streams.prompts, streams.got, strict=True):
        assert len(got) == count
        oracle.check("llama", prompt, got)


async def test_kill_of_a_decode_worker_in_mid_stream(running: System, oracle: Oracle) -> None:
    streams = Streams(running, 1, GREEDY)
    work = asyncio.create_task(streams.run())
    await streams.flowing()
    pid = await running.kill("decode")
    await work
    assert streams.resumes > 0, "the killed worker had streams to lose"
    check_exact(streams, oracle)
    await until(lambda: came_back(running, 3, pid), 60, lambda: "the worker was not started again")
    await running.assert_idle()


async def test_kill_of_the_prefill_worker_while_it_computes(running: System, oracle: Oracle) -> None:
    streams = Streams(running, 2, GREEDY, long_prompts=True)
    work = asyncio.create_task(streams.run())

    async def some_begun() -> bool:
        return sum(bool(got) for got in streams.got) >= 3

    await until(some_begun, 60, lambda: "no stream has begun")
    pid = await running.kill("prefill")
    await work
    check_exact(streams, oracle)
    await until(lambda: came_back(running, 3, pid), 60, lambda: "the worker was not started again")
    await running.assert_idle()


async def test_kill_of_redis_in_mid_stream(running: System, oracle: Oracle) -> None:
    streams = Streams(running, 3, GREEDY)
    work = asyncio.create_task(streams.run())
    await streams.flowing()
    os.kill(redis_pid(running), signal.SIGKILL)
    await work
    check_exact(streams, oracle)
    late = Streams(running, 4, GREEDY)
    await late.run()
    check_exact(late, oracle)
    await running.assert_idle()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """Serves the model in the box, whose answers are right only with every fact's KV."""
    log = tmp_path_factory.mktemp("box") / "log"
    async with system(model_in_the_box.DIRECTORY, log, "--dtype=float32", "--prefill=1", "--decode=2") as started:
        yield started


@pytest.fixture(scope="module")
def asked() -> list[Recall]:
    """All at once they are work for so long that a fast machine, too, has some left when one of its workers is killed
    as soon as the first blocks have moved."""
    return recall_questions(12, 7, 700, 1200, 1500)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(box: System, asked: list[Recall]) -> Recalled:
    recalled = await recall(box, asked, at_once=len(asked))
    assert recalled.share >= 0.9, recalled.wrong
    return recalled


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_facts_are_recalled_although_a_worker_is_killed(
    box: System, asked: list[Recall], undisturbed: Recalled, role: str
) -> None:
    moved = await box.metric("baton_kv_transfer_bytes_total")
    work = asyncio.create_task(recall(box, asked, at_once=len(asked)))
    async with asyncio.timeout(60):
        while await box.metric("baton_kv_transfer_bytes_total") == moved:
            pass
    pid = await box.kill(role)
    recalled = await work
    assert recalled.resumes > 0, "the killed worker had requests to lose"
    assert recalled.said == undisturbed.said, recalled.wrong
    await until(lambda: came_back(box, 3, pid), 60, lambda: "the worker was not started again")
    await box.assert_idle()


async def test_seeded_sampling_goes_on_as_it_would_have(running: System) -> None:
    sampling = SamplingParams(max_tokens=3 * OUTPUT, ignore_eos=True, temperature=0.9, top_p=0.95, top_k=50, seed=11)
    undisturbed = Streams(running, 5, sampling)
    await undisturbed.run()
    disturbed = Streams(running, 5, sampling)
    work = asyncio.create_task(disturbed.run())
    await disturbed.flowing()
    pid = await running.kill("decode")
    await work
    assert disturbed.resumes > 0
    assert disturbed.got == undisturbed.got
    await until(lambda: came_back(running, 3, pid), 60, lambda: "the worker was not started again")
    await running.assert_idle()


async def test_cancelled_streams_leave_nothing_behind(running: System) -> None:
    rng = random.Random(6)

    async def leave_early(number: int) -> None:
        async with running.client() as client:
            prompt = tokens(rng, rng.randrange(1, 1500))
            async for part in client.generate(prompt, GREEDY):
                if part.token_ids and rng.random() < 0.3:
                    return

    async def leave_at_once(number: int) -> None:
        async with running.client() as client:
            stream = client.generate(tokens(rng, rng.randrange(1, 1500)), GREEDY)
            reader = asyncio.create_task(anext(aiter(stream)))
            await asyncio.sleep(rng.random() * 0.2)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    await asyncio.gather(*(leave_early(n) if n % 2 else leave_at_once(n) for n in range(40)))
    await running.assert_idle(within=8)  # sooner than a lease would free what was forgotten


async def came_back(running: System, workers: int, not_pid: int) -> bool:
    ready = [w for w in await running.workers() if w["state"] == "ready"]
    return len(ready) == workers and not_pid not in [w["pid"] for w in ready]


def redis_pid(running: System) -> int:
    """The server that `python -m discovery`, a child of `baton up`, keeps."""
    for keeper in children(running.process.pid):
        for child in children(keeper):
            if "valkey-server" in Path(f"/proc/{child}/cmdline").read_bytes().decode():
                return child
    pytest.fail("no Redis process found")
