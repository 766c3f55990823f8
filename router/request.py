"""A request on its way through the router, between the doors and the relay.

A door (gRPC or HTTP) makes a `GenerateSpec` and iterates `Relay.generate`; closing the iterator cancels the
request on all workers. Whatever is wrong is raised as a BatonError from the first `anext` on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from baton.errors import InvalidRequest
from baton.ids import new_request_id
from baton.sampling import SamplingParams
from router.text import ChatMessage

WRITE_TIMEOUT_SECONDS = 60.0
"""A client that takes nothing of its stream for so long is cut off, by either door."""


class FinishReason(Enum):
    STOP = "stop"
    """End-of-sequence, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens or the model's length."""


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles taken, and what the template is told: `developer` is OpenAI's later word for `system`."""


def chat_role(name: str, value: object, shown: str) -> str:
    """The role that the template is told. Raises InvalidRequest, which calls the value `shown`."""
    if not isinstance(value, str) or value not in _ROLES:
        raise InvalidRequest(f"{name} is {shown}; it must be one of {', '.join(_ROLES)}", param="messages")
    return _ROLES[value]


@dataclass(frozen=True, slots=True)
class Conversation:
    """At least one message, for the model's chat template, which brings its own special tokens."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidRequest("messages is empty; it must have at least one message", param="messages")


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    prompt: str | tuple[int, ...] | Conversation
    """Text, which the router tokenises, token ids, used as they are, or a conversation, which it renders first."""
    sampling: SamplingParams
    model: str = ""
    """Served name; empty: the one that is served."""
    stop: tuple[str, ...] = ()
    request_id: str = field(default_factory=new_request_id)
    cache_salt: bytes = b""
    timeout_seconds: float | None = None
    """Until the request's deadline; None: the router's default."""
    add_special_tokens: bool = True
    """To a text; a conversation never gets any but its template's."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations in seconds; meanings in proto/baton/v1/inference.proto."""

    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    prefill_seconds: float = 0.0
    transfer_seconds: float = 0.0
    transfer_blocks: int = 0
    transfer_bytes: int = 0
    transport: str = ""
    resumes: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    usage: Usage
    prefill_worker: str
    decode_worker: str
    timings: Timings
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a stream gains at a time. The last one carries `finished`, and there is exactly one last one."""

    text: str
    token_ids: tuple[int, ...]
    finished: Finished | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    max_model_len: int


class Generates(Protocol):
    """What a door needs of the router's core."""

    def generate(self, spec: GenerateSpec) -> AsyncGenerator[Chunk, None]: ...

    def models(self) -> list[ServedModel]: ...

    def ready(self) -> str:
        """Empty when requests can be served now; else what is missing, for a person to read."""
        ...
