"""A core with a script in place of workers: what it is asked is kept, what it answers is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from router.request import Chunk, Conversation, Finished, FinishReason, GenerateSpec, ServedModel, Timings, Usage

MODEL = "org/tiny"


def finished(completion_tokens: int, reason: FinishReason = FinishReason.STOP, stop_string: str = "") -> Finished:
    return Finished(
        reason=reason,
        usage=Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=completion_tokens),
        prefill_worker="prefill-1",
        decode_worker="decode-1",
        timings=Timings(),
        stop_string=stop_string,
    )


def answer(*texts: str, reason: FinishReason = FinishReason.LENGTH, stop_string: str = "") -> list[Chunk]:
    """One token a text, numbered from 100; the last one is the end."""
    last = len(texts) - 1
    return [
        Chunk(text, (100 + i,), finished(len(texts), reason, stop_string) if i == last else None)
        for i, text in enumerate(texts)
    ]


@dataclass
class FakeCore:
    """`script` says what a request gets: chunks, an error to raise at that place, or an event to wait for."""

    script: Callable[[GenerateSpec], Sequence[Chunk | Exception | asyncio.Event]] = lambda spec: answer(
        "Hello", ", wor", "ld"
    )
    missing: str = ""
    served: list[ServedModel] = field(default_factory=lambda: [ServedModel(MODEL, 4096)])
    specs: list[GenerateSpec] = field(default_factory=list)
    open: int = 0
    produced: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a generation has been closed."""

    async def generate(self, spec: GenerateSpec) -> AsyncGenerator[Chunk, None]:
        self.specs.append(spec)
        self.open += 1
        try:
            for item in self.script(spec):
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    self.produced += 1
                    yield item
                await asyncio.sleep(0)
        finally:
            self.open -= 1
            self.closed.set()

    def models(self) -> list[ServedModel]:
        return self.served

    def ready(self) -> str:
        return self.missing


def shown(spec: GenerateSpec) -> str:
    """The conversation that was asked with, by a template that shows what it is given."""
    assert isinstance(spec.prompt, Conversation)
    turns = "".join(f"[{message['role']}]{message['content']}" for message in spec.prompt.messages)
    return turns + ("[assistant]" if spec.prompt.add_generation_prompt else "")
