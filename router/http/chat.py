"""/v1/chat/completions: a conversation to one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from baton.errors import InvalidRequest
from router.http.answering import Answering, Json
from router.http.asked import read_json, served_name
from router.http.body import flag, integer, json_field, kind_of, read_request, text, wrong
from router.http.errors import REQUEST_ID
from router.http.sampling import NEUTRAL_CHAT, SharedFields
from router.request import Conversation, Generates, GenerateSpec, chat_role
from router.text import ChatMessage


def _messages(name: str, value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list):
        raise wrong(name, value, "a list of at least one message")
    return tuple(_message(f"{name}[{place}]", item) for place, item in enumerate(value))


def _message(name: str, value: Any) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} is {kind_of(value)}; it must be an object", param="messages")
    said = value.get("role")
    role = chat_role(f"{name}.role", said, kind_of(said))
    for key, item in value.items():
        if key not in ("role", "content", "name") and item not in (None, "", [], {}):
            raise InvalidRequest(f"{name}.{key[:80]} is not supported, so leave it out", param="messages")
    message = ChatMessage(role=role, content=_content(f"{name}.content", value.get("content"), role))
    if value.get("name") is not None:
        message["name"] = text(f"{name}.name", value["name"])
    return message


def _content(name: str, value: Any, role: str) -> str:
    """Parts of text become one text, a line each, as templates take one."""
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} is {kind_of(value)}; it must be a string or a list of parts", param="messages")
    return "\n".join([_part(f"{name}[{place}]", part) for place, part in enumerate(value)])


def _part(name: str, value: Any) -> str:
    if isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return str(value["text"])
    said = kind_of(value.get("type")) if isinstance(value, dict) else kind_of(value)
    raise InvalidRequest(f'{name} is of type {said}; it must be {{"type": "text", "text": …}}', param="messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(SharedFields):
    messages: tuple[ChatMessage, ...] = json_field(_messages)
    max_completion_tokens: int | None = json_field(integer, None)
    max_tokens: int | None = json_field(integer, None)
    """OpenAI's earlier name of max_completion_tokens, which goes before it."""
    add_generation_prompt: bool = json_field(flag, True)


class ChatShape:
    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str) -> Json:
        return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None}

    def choice(self, index: int, text: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None}


class ChatCompletions:
    def __init__(self, core: Generates, write_timeout_seconds: float) -> None:
        self._core = core
        self._write_timeout = write_timeout_seconds

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = read_request(ChatRequest, await read_json(request), NEUTRAL_CHAT)
        model = served_name(self._core, asked.model)
        max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        spec = GenerateSpec(
            prompt=Conversation(asked.messages, asked.add_generation_prompt),
            sampling=asked.sampling(max_tokens),
            model=model,
            stop=asked.stop,
            request_id=request[REQUEST_ID],
            cache_salt=asked.cache_salt,
        )
        answering = Answering(
            core=self._core,
            specs=[spec],
            shape=ChatShape(),
            request_id=spec.request_id,
            model=model,
            with_token_ids=asked.return_token_ids,
            include_usage=asked.stream_options.include_usage,
        )
        if asked.stream:
            return await answering.stream(request, self._write_timeout)
        return web.json_response(await answering.whole())
