"""The Python client: `async with Client("127.0.0.1:50051") as client: async for part in client.generate(...)`.

Speaks baton.v1.Inference and turns gRPC statuses back into Baton's errors.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import grpc
from google.protobuf.message import Message as ProtoMessage

from baton import errors
from baton.rpc import CHANNEL_OPTIONS, PARAM_METADATA
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
ROLES = {pb.WORKER_ROLE_PREFILL: "prefill", pb.WORKER_ROLE_DECODE: "decode", pb.WORKER_ROLE_UNIFIED: "unified"}
STATES = {
    pb.WORKER_STATE_READY: "ready",
    pb.WORKER_STATE_DRAINING: "draining",
    pb.WORKER_STATE_UNREACHABLE: "unreachable",
}

_WIRE_IDS = 2**32
"""Token ids that the wire has room for; which of them the model knows is the router's to say."""
_ERRORS: dict[grpc.StatusCode, type[errors.BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.PromptTooLong,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ConfigError,
}


@dataclass(frozen=True, slots=True)
class Message:
    """One of a conversation's."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation, which the model's chat template makes a text of."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, with the names that `baton generate --json` prints."""

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: dict[str, int]
    """`prompt_tokens`, `cached_tokens`, `completion_tokens`."""
    prefill_worker: str
    decode_worker: str
    request_id: str
    timings: dict[str, Any]
    """Durations in seconds; meanings in proto/baton/v1/inference.proto."""

    @classmethod
    def of(cls, text: str, token_ids: list[int], finished: pb.Finished) -> Answer:
        return cls(
            text=text,
            token_ids=token_ids,
            finish_reason=FINISH_REASONS[finished.reason],
            usage=_fields(finished.usage),
            prefill_worker=finished.prefill_worker,
            decode_worker=finished.decode_worker,
            request_id=finished.request_id,
            timings=_fields(finished.timings),
        )


class Client:
    """One router's. Every method raises BatonError."""

    def __init__(self, target: str = "127.0.0.1:50051") -> None:
        self.target = target
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is open."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        model: str = "",
        stop: Sequence[str] = (),
        request_id: str = "",
        cache_salt: bytes = b"",
        timeout: float | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer as it comes: `text` and `token_ids` of each part, `finished` in the last.

        Leaving the loop cancels. `timeout` is the request's deadline, in seconds. Requests share cached prefix blocks
        only with requests of the same `cache_salt`.
        """
        sampling = sampling or SamplingParams()
        sampling.check(_WIRE_IDS)
        try:
            request = pb.GenerateRequest(
                model=model,
                sampling=sampling.to_proto(),
                stop=stop,
                request_id=request_id,
                cache_salt=cache_salt,
            )
            _set_prompt(request, prompt)
        except (ValueError, TypeError, AttributeError) as error:  # AttributeError: ids among messages
            raise errors.InvalidRequest(
                f"the request cannot be sent: {error}; texts must be valid Unicode, numbers whole and below 2^32"
            ) from None
        call = self._stub.Generate(request, timeout=timeout)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()

    async def answer(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        hear: Callable[[str], object] | None = None,
        **options: Any,
    ) -> Answer:
        """The whole answer; `hear` is called with its text, piece by piece, as it comes. Options as for `generate`."""
        text: list[str] = []
        token_ids: list[int] = []
        finished = None
        async with aclosing(self.generate(prompt, sampling, **options)) as responses:
            async for response in responses:
                text.append(response.text)
                token_ids += response.token_ids
                if hear is not None and response.text:
                    hear(response.text)
                if response.HasField("finished"):
                    finished = response.finished
        if finished is None:
            raise errors.InternalError("the stream ended without its last message")
        return Answer.of("".join(text), token_ids, finished)

    async def status(self, timeout: float = 5.0) -> pb.GetStatusResponse:
        try:
            return await self._stub.GetStatus(pb.GetStatusRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    def _error(self, error: grpc.aio.AioRpcError) -> errors.BatonError:
        kind = _ERRORS.get(error.code(), errors.InternalError)
        details = error.details() or error.code().name
        param = error.trailing_metadata().get(PARAM_METADATA)
        if kind is errors.Unavailable and param is None:
            if "failed to connect" in details:
                details = f"no router answers at {self.target}: start one with `baton up`, or give --target"
            else:
                details = f"the router at {self.target} went away: {details}"
        return kind(details, param=str(param) if param else None)


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) and isinstance(prompt[0], Message):
        messages = cast(Sequence[Message], prompt)
        request.messages.messages.extend(pb.Message(role=m.role, content=m.content) for m in messages)
    else:
        request.token_ids.ids.extend(cast(Sequence[int], prompt))


def status_to_json(status: pb.GetStatusResponse) -> str:
    """The form of `baton status --json`."""
    workers = [
        {
            "id": w.id,
            "role": ROLES.get(w.role, "unknown"),
            "address": w.address,
            "metrics": w.metrics,
            "pid": w.pid,
            "state": STATES.get(w.state, "unknown"),
            "running": w.load.running,
            "waiting": w.load.waiting,
            "available_blocks": w.load.available_blocks,
            "total_blocks": w.load.total_blocks,
        }
        for w in status.workers
    ]
    models = [{"name": m.name, "max_model_len": m.max_model_len} for m in status.models]
    redis = status.redis_connected
    return json.dumps({"workers": workers, "models": models, "redis_connected": redis, "http": status.http_address})


def _fields(message: ProtoMessage) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
