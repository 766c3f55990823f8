"""Prefill and decode workers that lay out their KV differently: token-exact where nothing is rounded, with a measured
error where something is, and refused by name where nothing matches."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from baton.client import Answer
from baton.sampling import SamplingParams
from tests.checkpoints import build_checkpoint, build_model
from tests.system.conftest import Oracle, tokens
from tests.system.harness import ROOT, START_SECONDS, System, system, tail, until

pytestmark = pytest.mark.slow

MIXED = "tests.system.mixed"
OUTPUT = 24


def prompts() -> list[tuple[int, ...]]:
    """Around multiples of every block size, and two conversations whose second turn begins with the first."""
    rng = random.Random(11)
    lengths = [65, 79, 80, 81, 95, 96, 97, 127, 128, 129, 333, 900]
    return [tokens(rng, length) for length in lengths]


async def ask(running: System, prompt: Sequence[int], count: int = OUTPUT) -> Answer:
    async with running.client() as client:
        return await client.answer(tuple(prompt), SamplingParams(max_tokens=count, ignore_eos=True), timeout=120)


async def answers_of(running: System, asked: Sequence[tuple[int, ...]]) -> list[Answer]:
    answers = await asyncio.gather(*(ask(running, prompt) for prompt in asked))
    assert {(a.prefill_worker, a.decode_worker) for a in answers} == {("prefill-0", "decode-0")}
    assert all(a.timings["resumes"] == 0 for a in answers)
    return list(answers)


@pytest.mark.parametrize(("prefill", "decode", "transport"), [(8, 16, "shm"), (16, 32, "tcp"), (32, 16, "shm")])
async def test_any_block_size_lands_in_any_other_token_exact(
    prefill: int, decode: int, transport: str, checkpoint: Callable[[str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    flags = [f"--on-prefill=--block-size={prefill}", f"--on-decode=--block-size={decode}", f"--transport={transport}"]
    async with system(checkpoint("llama"), tmp_path / "log", *flags, command=MIXED) as running:
        first = prompts()
        said = await answers_of(running, first)
        # A second turn: the decode worker has the first one cached in its own blocks, part of which straddle others.
        second = [
            (*prompt, *answer.token_ids, *tokens(random.Random(5), 90))
            for prompt, answer in zip(first, said, strict=True)
        ]
        again = await answers_of(running, second)
        await running.assert_idle()
        assert await running.metric("baton_kv_relaid_bytes_total") > 0
        assert await running.metric("baton_kv_relaid_bytes_total") == await running.metric(
            "baton_kv_transfer_bytes_total", transport=transport
        )
        assert await running.metric("baton_kv_verify_failures_total") == 0
        moved = sum(int(a.timings["transfer_blocks"]) for a in again)
        whole = sum(-(-len(prompt) // prefill) for prompt in second)
        assert moved < whole / 2, "what was cached is not pulled again"
    for prompt, answer in zip(first + second, said + again, strict=True):
        oracle.check("llama", prompt, answer.token_ids)
    log = (tmp_path / "log").read_text()
    assert log.count(f"are re-laid on their way in: block size {prefill} to {decode}; no value changes") == 1


@cache
def _float32() -> PreTrainedModel:
    return build_model("llama")


def log_probabilities(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Of each token of the answer, by transformers in float32."""
    with torch.inference_mode():
        logits = _float32()(torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=len(answer)).logits[0]
    return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")],
)
async def test_a_dtype_lands_in_another_with_an_error_of_that_dtype(
    prefill: str, decode: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """How much less likely than the likeliest the said tokens are to a float32 model: about as much as where one worker
    computes all of it in the coarser of the two dtypes."""
    flags = [f"--on-prefill=--dtype={prefill}", f"--on-decode=--dtype={decode}", "--on-prefill=--block-size=8"]
    async with system(checkpoint("llama"), tmp_path / "log", *flags, command=MIXED) as running:
        asked = prompts()
        said = await answers_of(running, asked)
        again = await answers_of(running, asked)
        await running.assert_idle()
        assert await running.metric("baton_kv_relaid_bytes_total") > 0
        moved = [sum(int(a.timings["transfer_blocks"]) for a in turn) for turn in (said, again)]
        assert moved[0] == moved[1], "what another dtype computed is not cached as if it had been computed here"
    flags = ["--unified=1", f"--dtype={coarser(prefill, decode)}"]
    async with system(checkpoint("llama"), tmp_path / "alone", *flags) as running:
        alone = await asyncio.gather(*(ask(running, prompt) for prompt in asked))
    lost, usual = shortfall(asked, said), shortfall(asked, alone)
    print(f"{prefill} to {decode}: {shown(lost)}; all in {coarser(prefill, decode)}: {shown(usual)}")
    assert lost.mean() <= 1.5 * usual.mean() + 1e-4
    log = (tmp_path / "log").read_text()
    rounding = "no value changes" if decode == "float32" else f"values are rounded to {decode}"
    assert f"block size 8 to 16, dtype {prefill} to {decode}; {rounding}" in log


def coarser(*dtypes: str) -> str:
    return "bfloat16" if "bfloat16" in dtypes else "float16"


def shortfall(asked: Sequence[Sequence[int]], answers: Sequence[Answer]) -> torch.Tensor:
    """In nats, of each token of all answers."""
    found = []
    for prompt, answer in zip(asked, answers, strict=True):
        likely = log_probabilities(prompt, answer.token_ids)
        said = likely.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        found.append(likely.max(-1).values - said)
    return torch.cat(found)


def shown(lost: torch.Tensor) -> str:
    return f"mean {lost.mean():.1e} nats, most {lost.max():.1e}, {(lost == 0).float().mean():.1%} greedy"


async def test_a_worker_of_another_model_is_refused_by_name_as_soon_as_it_is_there(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    other = build_checkpoint("llama", tmp_path / "other", seed=1)
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", MIXED, "up", f"--model={checkpoint('llama')}", "--served-model-name=llama",
            "--grpc-port=0", "--http-port=0", f"--on-prefill=--model={other}", stderr=stderr, cwd=ROOT,
        )  # fmt: skip

    async def refused() -> bool:
        return "serves something else: its model fingerprint is " in log.read_text()

    try:
        await until(refused, START_SECONDS, lambda: tail(log))
        assert process.returncode is None, "it says so, and goes on to wait for a worker that fits"
    finally:
        process.terminate()
        await process.wait()
