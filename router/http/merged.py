"""One HTTP request's generations as one stream of numbered chunks. Owns the tasks that several prompts need.

Closing the iterator closes every generation under way, and so cancels it on the workers. The first generation that
fails ends the others. A reader that is slow holds all of them back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from router.request import Chunk, Generates, GenerateSpec

_AHEAD = 16
"""Chunks that may wait for the reader, over all generations."""

Numbered = tuple[int, Chunk]


async def generate_all(core: Generates, specs: Sequence[GenerateSpec]) -> AsyncGenerator[Numbered, None]:
    """Chunks of all `specs` as they come, each with the place of its spec. Raises what a generation raises."""
    if len(specs) > 1:
        async with aclosing(_interleaved(core, specs)) as numbered:
            async for item in numbered:
                yield item
        return
    async with aclosing(core.generate(specs[0])) as chunks:
        async for chunk in chunks:
            yield 0, chunk


async def _interleaved(core: Generates, specs: Sequence[GenerateSpec]) -> AsyncGenerator[Numbered, None]:
    queue: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue(_AHEAD)

    async def relay(index: int, spec: GenerateSpec) -> None:
        try:
            async with aclosing(core.generate(spec)) as chunks:
                async for chunk in chunks:
                    await queue.put((index, chunk))
            await queue.put(None)
        except Exception as error:  # handed to the reader, who raises it
            await queue.put(error)

    tasks = [asyncio.create_task(relay(index, spec)) for index, spec in enumerate(specs)]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
