"""Starting, losing, draining and ending whole systems."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.client import Answer
from baton.errors import BatonError
from baton.sampling import SamplingParams
from tests.system.conftest import Oracle, tokens
from tests.system.harness import ROOT, System, children, running_now, system, until

pytestmark = pytest.mark.slow


async def ask(running: System, prompt: tuple[int, ...], count: int = 40) -> Answer:
    async with running.client() as client:
        return await client.answer(prompt, SamplingParams(max_tokens=count, ignore_eos=True), timeout=60)


async def test_a_drain_lets_open_streams_end(checkpoint: Callable[[str], Path], oracle: Oracle, tmp_path: Path) -> None:
    rng = random.Random(1)
    prompts = [tokens(rng, rng.randrange(1, 600)) for _ in range(8)]
    async with system(checkpoint("llama"), tmp_path / "log") as running:
        work = [asyncio.create_task(ask(running, prompt, 300)) for prompt in prompts]

        async def all_open() -> bool:
            return await running.metric("baton_requests_open") == len(prompts)

        await until(all_open, 30, lambda: "the requests have not arrived")
        assert await running.stop() == 0
        for prompt, answer in zip(prompts, await asyncio.gather(*work), strict=True):
            assert len(answer.token_ids) == 300
            oracle.check("llama", prompt, answer.token_ids)


async def test_streams_outlive_the_only_decode_worker_and_the_only_prefill_worker(
    checkpoint: Callable[[str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    rng = random.Random(5)
    prompts = [tokens(rng, rng.randrange(70, 400)) for _ in range(16)]
    async with system(checkpoint("mistral"), tmp_path / "log") as running:
        work = [asyncio.create_task(ask(running, prompt, 400)) for prompt in prompts]

        async def in_mid_stream() -> bool:
            return await running.metric("vllm:generation_tokens_total") > 16 * 20

        await until(in_mid_stream, 30, lambda: "the streams have not begun")
        await running.kill("decode")
        await running.kill("prefill")
        for prompt, answer in zip(prompts, await asyncio.gather(*work), strict=True):
            assert len(answer.token_ids) == 400
            oracle.check("mistral", prompt, answer.token_ids)
        assert await running.metric("baton_requests_resumed_total") > 0
        await running.assert_idle()


async def test_unified_workers_serve_whole_prompts(
    checkpoint: Callable[[str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    rng = random.Random(2)
    async with system(checkpoint("qwen3"), tmp_path / "log", "--unified=2") as running:
        assert {w["role"] for w in await running.workers()} == {"unified"}
        prompts = [tokens(rng, 300) for _ in range(6)]
        for prompt, answer in zip(prompts, await asyncio.gather(*(ask(running, p) for p in prompts)), strict=True):
            oracle.check("qwen3", prompt, answer.token_ids)
            assert answer.prefill_worker == answer.decode_worker
            assert answer.timings["transfer_blocks"] == 0
        await running.assert_idle()


async def test_the_router_and_the_keeper_of_redis_come_back_where_they_were(
    checkpoint: Callable[[str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    prompt = tokens(random.Random(3), 200)
    async with system(checkpoint("llama"), tmp_path / "log") as running:
        await ask(running, prompt)
        os.kill(part_pid(running, "router"), signal.SIGKILL)
        os.kill(part_pid(running, "discovery"), signal.SIGKILL)

        async def serves() -> bool:
            try:
                return len([w for w in await running.workers() if w["state"] == "ready"]) == 2
            except BatonError:
                return False

        await until(serves, 60, lambda: f"no router at the old address; see {running.log}")
        answer = await ask(running, prompt)
        oracle.check("llama", prompt, answer.token_ids)
        await running.assert_idle()


async def test_kill_of_baton_up_leaves_no_process(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    async with system(checkpoint("llama"), tmp_path / "log", ends_with=-signal.SIGKILL) as running:
        family = [pid for child in children(running.process.pid) for pid in (child, *children(child))]
        assert len(family) == 5, "router, two workers, Redis and its keeper"
        running.process.kill()

        async def all_gone() -> bool:
            return not any(running_now(pid) for pid in family)

        await until(all_gone, 30, lambda: f"left behind: {[pid for pid in family if running_now(pid)]}")


async def test_a_worker_that_serves_something_else_is_named_and_not_used(
    checkpoint: Callable[[str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    async with system(checkpoint("llama"), tmp_path / "log") as running:
        url = re.search(r"redis://\S+", running.log.read_text())
        assert url is not None
        flags = [
            f"--model={checkpoint('llama')}",
            f"--redis-url={url.group()}",
            "--max-model-len=512",
            "--worker-id=odd",
        ]
        odd = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "decode_worker", *flags, stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        try:
            found: list[str] = []

            async def named() -> bool:
                async with running.client() as client:
                    found[:] = [w.detail for w in (await client.status()).workers if w.id == "odd"]
                return any("max_model_len" in detail for detail in found)

            await until(named, 30, lambda: f"the status says {found}")
            prompts = [tokens(random.Random(4), 150) for _ in range(6)]
            for prompt in prompts:
                answer = await ask(running, prompt)
                assert answer.decode_worker == "decode-0"
                oracle.check("llama", prompt, answer.token_ids)
        finally:
            odd.terminate()
            assert await odd.wait() == 0


def part_pid(running: System, module: str) -> int:
    for pid in children(running.process.pid):
        if f"\0-m\0{module}\0" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    pytest.fail(f"no {module} process")
