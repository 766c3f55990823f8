"""Asks a running Baton many questions at once, token ids in and out. Judges no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.client import Answer, Client
from baton.sampling import SamplingParams


async def ask(
    client: Client,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    at_once: int = 16,
    request_ids: Sequence[str] = (),
    timeout: float | None = None,
) -> list[Answer]:
    """Greedy answers of at most `max_tokens` tokens, in the order of `prompts`. Raises BatonError.

    With `request_ids`, one for each prompt, each is asked as if nobody had asked it before: its id is its cache salt.
    `timeout` is each request's deadline, in seconds.
    """
    free, sampling = asyncio.Semaphore(at_once), SamplingParams(max_tokens=max_tokens)

    async def one(prompt: Sequence[int], request_id: str) -> Answer:
        async with free:
            return await client.answer(
                prompt, sampling, request_id=request_id, cache_salt=request_id.encode(), timeout=timeout
            )

    ids = request_ids or [""] * len(prompts)
    return await asyncio.gather(*(one(prompt, id) for prompt, id in zip(prompts, ids, strict=True)))
