"""Invariant 1: what the whole system says is what transformers says, token for token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.client import Answer
from baton.sampling import SamplingParams
from tests.checkpoints import FAMILIES
from tests.kvtransfer.transport_rigs import NixlRig
from tests.system.conftest import Oracle, tokens
from tests.system.harness import System, system

ON_GPU = Path("/dev/nvidiactl").exists()
NEIGHBOURS = "cuda_ipc" if ON_GPU else "shm"
"""How blocks move between two workers of one machine."""
NO_NIXL = ON_GPU or bool(NixlRig.missing())


def mixed_prompts() -> list[tuple[int, ...]]:
    """64 prompts of 1 to 3,000 tokens, many of which begin alike."""
    rng = random.Random(7)
    heads = [tokens(rng, length) for length in (40, 320, 1100)]
    lengths = [1, 2, 15, 16, 17, 32, 3000, 2999] + [rng.randrange(1, 65) for _ in range(32)]
    lengths += [rng.randrange(65, 400) for _ in range(12)] + [rng.randrange(400, 2000) for _ in range(12)]
    prompts = []
    for number, length in enumerate(lengths):
        head = rng.choice(heads)[:length] if number % 2 else ()
        prompts.append(head + tokens(rng, length - len(head)))
    rng.shuffle(prompts)
    return prompts


def output_of(prompt: tuple[int, ...]) -> int:
    """Tokens to generate: short prompts begin together on the decode worker and outgrow the pool there."""
    return 256 if len(prompt) <= 64 else 12


async def ask(running: System, prompt: tuple[int, ...]) -> Answer:
    sampling = SamplingParams(max_tokens=output_of(prompt), ignore_eos=True)
    async with running.client() as client:
        return await client.answer(prompt, sampling, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "transport"),
    [
        *((family, transport) for family in FAMILIES for transport in (NEIGHBOURS, "tcp")),
        pytest.param(
            FAMILIES[0],
            "nixl",
            marks=pytest.mark.skipif(NO_NIXL, reason=NixlRig.missing() or "nixl moves pools of CPUs"),
        ),
    ],
)
async def test_64_requests_at_once_equal_transformers(
    family: str,
    transport: str,
    checkpoint: Callable[[str], Path],
    oracle: Oracle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")  # for nixl's
    prompts = mixed_prompts()
    # 3,012 tokens are 189 blocks: one long request fits, and all others must make room.
    flags = ["--kv-blocks=224", f"--transport={transport}", "--max-num-batched-tokens=512", "--lease-seconds=2"]
    async with system(checkpoint(family), tmp_path / "log", *flags) as running:
        answers = await asyncio.gather(*(ask(running, prompt) for prompt in prompts))
        await running.assert_idle()
        assert await running.metric("vllm:num_preemptions_total") > 0, "the pool was meant to be too small"
        assert await running.metric("baton_kv_transfer_bytes_total", transport=transport) > 0
        assert await running.metric("baton_requests_resumed_total") == 0, "offers are kept while there is no room"
        assert await running.metric("baton_kv_verify_failures_total") == 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == output_of(prompt)
        oracle.check(family, prompt, answer.token_ids)
    assert {a.prefill_worker for a in answers} == {"prefill-0", "decode-0"}, "short prompts stay on the decode worker"
    assert {a.decode_worker for a in answers} == {"decode-0"}
