"""/v1/completions: one or several prompts, as text or token ids, each to one choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from baton.errors import InvalidRequest
from router.http.answering import Answering, Json
from router.http.asked import read_json, served_name
from router.http.body import flag, integer, json_field, read_request, text, token_ids, wrong
from router.http.errors import REQUEST_ID
from router.http.sampling import NEUTRAL_COMPLETIONS, SharedFields
from router.request import Generates, GenerateSpec

MAX_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16

Prompt = str | tuple[int, ...]


def _prompts(name: str, value: Any) -> tuple[Prompt, ...]:
    """OpenAI's four forms: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong(name, value, "a string, a list of strings, token ids, or lists of token ids")
    if not value:
        raise InvalidRequest(f"{name} is an empty list; it must have at least one prompt", param=name)
    if type(value[0]) is int:
        return (token_ids(name, value),)
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"{name} has {len(value)} prompts; it must have at most {MAX_PROMPTS} of them", param=name)
    read = text if isinstance(value[0], str) else token_ids
    return tuple(read(f"{name}[{place}]", item) for place, item in enumerate(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(SharedFields):
    prompt: tuple[Prompt, ...] = json_field(_prompts)
    max_tokens: int = json_field(integer, _DEFAULT_MAX_TOKENS)
    add_special_tokens: bool = json_field(flag, True)


class CompletionShape:
    prefix = "cmpl-"
    whole_object = "text_completion"
    event_object = "text_completion"

    def opening(self, index: int) -> Json | None:
        return None

    def delta(self, index: int, text: str) -> Json:
        return {"index": index, "text": text, "logprobs": None}

    choice = delta


class Completions:
    def __init__(self, core: Generates, write_timeout_seconds: float) -> None:
        self._core = core
        self._write_timeout = write_timeout_seconds

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = read_request(CompletionRequest, await read_json(request), NEUTRAL_COMPLETIONS)
        model = served_name(self._core, asked.model)
        request_id = request[REQUEST_ID]
        several = len(asked.prompt) > 1
        answering = Answering(
            core=self._core,
            specs=[
                GenerateSpec(
                    prompt=prompt,
                    sampling=asked.sampling(asked.max_tokens),
                    model=model,
                    stop=asked.stop,
                    request_id=f"{request_id}-{index}" if several else request_id,
                    cache_salt=asked.cache_salt,
                    add_special_tokens=asked.add_special_tokens,
                )
                for index, prompt in enumerate(asked.prompt)
            ],
            shape=CompletionShape(),
            request_id=request_id,
            model=model,
            with_token_ids=asked.return_token_ids,
            include_usage=asked.stream_options.include_usage,
        )
        if asked.stream:
            return await answering.stream(request, self._write_timeout)
        return web.json_response(await answering.whole())
