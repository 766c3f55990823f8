"""From numbered chunks to a response, streamed or whole. What completions and chat have in common.

An endpoint brings a `Shape`, which knows how its objects look; here is when each is sent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from baton.errors import InternalError
from router.http.errors import ClientGone, as_baton_error
from router.http.merged import generate_all
from router.http.sse import EventStream
from router.request import Chunk, Finished, Generates, GenerateSpec, Usage

Json = dict[str, Any]


class Shape(Protocol):
    """How one endpoint's objects look."""

    prefix: str
    """Of ids, as OpenAI's have one."""
    whole_object: str
    """`object` of a whole answer."""
    event_object: str
    """`object` of an event."""

    def opening(self, index: int) -> Json | None:
        """The choice that begins the answer of that index; None where none does."""
        ...

    def delta(self, index: int, text: str) -> Json: ...

    def choice(self, index: int, text: str) -> Json: ...


@dataclass(frozen=True, slots=True)
class Answering:
    """One HTTP request, understood."""

    core: Generates
    specs: Sequence[GenerateSpec]
    shape: Shape
    request_id: str
    model: str
    with_token_ids: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> Json:
        texts: list[list[str]] = [[] for _ in self.specs]
        ids: list[list[int]] = [[] for _ in self.specs]
        ends: dict[int, Finished] = {}
        async with aclosing(generate_all(self.core, self.specs)) as numbered:
            async for index, chunk in numbered:
                texts[index].append(chunk.text)
                ids[index] += chunk.token_ids
                if chunk.finished is not None:
                    ends[index] = chunk.finished
        _require_all(ends, self.specs)
        choices = [
            self.shape.choice(index, "".join(texts[index])) | self._end(ends[index], ids[index])
            for index in range(len(self.specs))
        ]
        head = self._head(self.shape.whole_object)
        return head | {"choices": choices, "usage": usage_json([end.usage for end in ends.values()])}

    async def stream(self, request: web.Request, write_timeout_seconds: float) -> web.StreamResponse:
        """Headers go out with the first chunk, so that what is refused at once has a status of its own."""
        events = EventStream(request, write_timeout_seconds)
        ends: dict[int, Finished] = {}
        opened: set[int] = set()
        try:
            async with aclosing(generate_all(self.core, self.specs)) as numbered:
                async for index, chunk in numbered:
                    choices = [self._delta(index, chunk)]
                    if index not in opened:
                        opened.add(index)
                        choices.insert(0, self.shape.opening(index))
                    await events.send(*(self._event([choice]) for choice in choices if choice is not None))
                    if chunk.finished is not None:
                        ends[index] = chunk.finished
            _require_all(ends, self.specs)
        except Exception as error:
            if not events.begun or isinstance(error, ClientGone):
                raise
            return await events.fail(as_baton_error(error, self.request_id))
        if self.include_usage:
            usage = usage_json([end.usage for end in ends.values()])
            await events.send(self._head(self.shape.event_object) | {"choices": [], "usage": usage})
        return await events.done()

    def _delta(self, index: int, chunk: Chunk) -> Json | None:
        """None for a chunk that says nothing, such as the first half of a character."""
        if not chunk.text and chunk.finished is None and not (self.with_token_ids and chunk.token_ids):
            return None
        return self.shape.delta(index, chunk.text) | self._end(chunk.finished, chunk.token_ids)

    def _end(self, finished: Finished | None, token_ids: Sequence[int]) -> Json:
        end: Json = {"finish_reason": None if finished is None else finished.reason.value}
        if finished is not None:
            end["stop_reason"] = finished.stop_string or None  # vLLM's name for the stop string that matched
        if self.with_token_ids:
            end["token_ids"] = list(token_ids)
        return end

    def _event(self, choices: Sequence[Json]) -> Json:
        event = self._head(self.shape.event_object) | {"choices": choices}
        return event | {"usage": None} if self.include_usage else event

    def _head(self, kind: str) -> Json:
        name = self.request_id.removeprefix("req-")
        return {"id": f"{self.shape.prefix}{name}", "object": kind, "created": self.created, "model": self.model}


def usage_json(usages: Sequence[Usage]) -> Json:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def _require_all(ends: Mapping[int, Finished], specs: Sequence[GenerateSpec]) -> None:
    """An answer without an end is not passed off as a whole one."""
    if len(ends) != len(specs):
        raise InternalError("the answer broke off without an end")
