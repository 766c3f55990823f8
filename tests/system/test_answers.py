"""What one system promises of its answers: seeds, prefixes, doors, and that bad input costs nobody else."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import openai
import pytest
import pytest_asyncio

from baton.client import Answer
from baton.errors import BatonError, InvalidRequest, ModelNotFound, Overloaded
from baton.sampling import SamplingParams
from tests.checkpoints import VOCAB_SIZE
from tests.system.conftest import Oracle, tokens
from tests.system.harness import System, run_cli, system

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

POOL_TOKENS = 100 * 16


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    log = tmp_path_factory.mktemp("answers") / "log"
    async with system(checkpoint("llama"), log, "--kv-blocks=100", "--served-model-name=tiny") as started:
        yield started


async def ask(running: System, prompt: str | tuple[int, ...], sampling: SamplingParams, **options: object) -> Answer:
    async with running.client() as client:
        return await client.answer(prompt, sampling, **options)


SEEDED = SamplingParams(max_tokens=200, ignore_eos=True, temperature=1.1, top_p=0.9, top_k=40, seed=5)


async def test_seeded_sampling_alone_in_a_batch_and_after_preemption(running: System) -> None:
    rng = random.Random(1)
    prompts = [tokens(rng, rng.randrange(1, 60)) for _ in range(64)]
    alone = [await ask(running, prompt, SEEDED) for prompt in prompts[:3]]
    before = await running.metric("vllm:num_preemptions_total")
    batch = await asyncio.gather(*(ask(running, prompt, SEEDED) for prompt in prompts))
    assert await running.metric("vllm:num_preemptions_total") > before, "64 streams were meant to outgrow the pool"
    assert [a.token_ids for a in batch[:3]] == [a.token_ids for a in alone]
    again = await asyncio.gather(*(ask(running, prompt, SEEDED) for prompt in prompts))
    assert [a.token_ids for a in again] == [a.token_ids for a in batch]
    await running.assert_idle()


async def test_a_second_request_with_the_same_prefix_computes_only_the_rest(running: System, oracle: Oracle) -> None:
    rng = random.Random(2)
    prefix = tokens(rng, 1000)
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    first = await ask(running, prefix + tokens(rng, 20), greedy)
    computed = await running.metric("vllm:iteration_tokens_total_sum")
    prompt = prefix + tokens(rng, 20)
    second = await ask(running, prompt, greedy)
    assert first.usage["cached_tokens"] == 0
    assert second.usage["cached_tokens"] == 1000 // 16 * 16
    computed = await running.metric("vllm:iteration_tokens_total_sum") - computed
    assert computed <= 1020 - 992 + 8
    oracle.check("llama", prompt, second.token_ids)


async def test_token_ids_in_and_out_by_the_command_line(running: System, oracle: Oracle) -> None:
    ids = ",".join(map(str, range(10, 110)))
    flags = ["--max-tokens=12", "--temperature=0", "--ignore-eos", f"--target={running.grpc}", "--json"]
    status, out, err = await run_cli("generate", f"--token-ids={ids}", *flags)
    assert status == 0, err
    answer = json.loads(out)
    oracle.check("llama", range(10, 110), answer["token_ids"])
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 100, "cached_tokens": 0, "completion_tokens": 12}
    assert (answer["prefill_worker"], answer["decode_worker"]) == ("prefill-0", "decode-0")
    assert answer["timings"]["transfer_blocks"] == 7


async def test_text_streams_and_is_what_json_says(running: System) -> None:
    flags = ["--max-tokens=30", "--ignore-eos", f"--target={running.grpc}"]
    _, plain, _ = await run_cli("generate", "The relay team", *flags)
    _, whole, _ = await run_cli("generate", "The relay team", *flags, "--json")
    assert plain.removesuffix("\n") == json.loads(whole)["text"]


async def test_status_names_every_worker(running: System) -> None:
    status, out, err = await run_cli("status", f"--target={running.grpc}", "--json")
    assert status == 0, err
    workers = {w["id"]: w for w in json.loads(out)["workers"]}
    assert {(w["role"], w["state"]) for w in workers.values()} == {("prefill", "ready"), ("decode", "ready")}
    assert all(w["pid"] and w["address"] and w["metrics"] for w in workers.values())
    _, table, _ = await run_cli("status", f"--target={running.grpc}")
    assert "prefill-0" in table
    assert "decode-0" in table


async def test_the_openai_client_works(running: System, oracle: Oracle) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.http}/v1", api_key="none", max_retries=0) as client:
        models = await client.models.list()
        assert [m.id for m in models.data] == ["tiny"]
        prompt = list(tokens(random.Random(3), 90))
        whole = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=10, temperature=0, extra_body={"ignore_eos": True}
        )
        streamed = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=10, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        assert "".join([part.choices[0].text async for part in streamed]) == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 10
        messages = [{"role": "user", "content": "Who passes the baton?"}]
        chat = await client.chat.completions.create(model="tiny", messages=messages, seed=3, max_tokens=20)
        again = await client.chat.completions.create(model="tiny", messages=messages, seed=3, max_tokens=20)
        assert chat.choices[0].message.content == again.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="other"):
            await client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("prompt", "sampling", "options", "error", "words"),
    [
        ("", {}, {}, InvalidRequest, ["empty"]),
        ((), {}, {}, InvalidRequest, ["empty"]),
        ((1,) * 5000, {}, {}, InvalidRequest, ["5000", "1600"]),
        ((1,) * POOL_TOKENS, {}, {}, InvalidRequest, [str(POOL_TOKENS)]),
        ((1, VOCAB_SIZE), {}, {}, InvalidRequest, [str(VOCAB_SIZE), str(VOCAB_SIZE - 1)]),
        ("x", {"temperature": float("nan")}, {}, InvalidRequest, ["temperature", "nan"]),
        ("x", {"temperature": -1.0}, {}, InvalidRequest, ["temperature", "-1"]),
        ("x", {"temperature": 1e30}, {}, InvalidRequest, ["temperature", "100"]),
        ("x", {"top_p": 0.0}, {}, InvalidRequest, ["top_p"]),
        ("x", {"top_p": float("inf")}, {}, InvalidRequest, ["top_p"]),
        ("x", {"max_tokens": 0}, {}, InvalidRequest, ["max_tokens"]),
        ("x", {"stop_token_ids": (VOCAB_SIZE,)}, {}, InvalidRequest, ["stop_token_ids"]),
        ("x", {}, {"model": "other"}, ModelNotFound, ["other", "tiny"]),
        ("x", {}, {"stop": [""]}, InvalidRequest, ["stop"]),
        ("x" * (17 << 20), {}, {}, Overloaded, ["larger than max"]),
    ],
)
async def test_bad_requests_are_refused_by_name(
    running: System, prompt: str | tuple[int, ...], sampling: dict, options: dict, error: type[BatonError], words: list
) -> None:
    with pytest.raises(error) as caught:
        await ask(running, prompt, SamplingParams(**sampling), **options)
    for word in words:
        assert word in caught.value.message
    fine = await ask(running, "still there", SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(fine.token_ids) == 2


async def test_a_refused_request_exits_1_with_one_line(running: System) -> None:
    status, out, err = await run_cli("generate", "hello", "--top-p=7", f"--target={running.grpc}")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "top_p" in err


async def test_bytes_that_are_not_utf8_are_a_400(running: System) -> None:
    async with aiohttp.ClientSession() as session:
        body = b'{"model": "tiny", "prompt": "\xff\xfe"}'
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{running.http}/v1/completions", data=body, headers=headers) as response:
            assert response.status == 400
            assert "UTF-8" in (await response.json())["error"]["message"]


async def test_health_says_ready(running: System) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("health", "healthz", "readyz"):
            async with session.get(f"{running.http}/{path}") as response:
                assert response.status == 200
