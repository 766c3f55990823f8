"""Asks a running Baton many questions at once, token ids in and out. Judges no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.client import Answer, Client
from baton.sampling import SamplingParams


async def ask(client: Client, prompts: Sequence[Sequence[int]], *, max_tokens: int, at_once: int = 16) -> list[Answer]:
    """Greedy answers of at most `max_tokens` tokens, in the order of `prompts`. Raises BatonError."""
    free = asyncio.Semaphore(at_once)

    async def one(prompt: Sequence[int]) -> Answer:
        async with free:
            return await client.answer(prompt, SamplingParams(max_tokens=max_tokens))

    return await asyncio.gather(*map(one, prompts))
