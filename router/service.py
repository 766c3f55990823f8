"""The gRPC door: `baton.v1.Inference` on the router's core. Translates messages; decides nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any, Protocol

import grpc

from baton.errors import DeadlineExceeded, RequestCancelled
from baton.ids import new_request_id
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2, inference_pb2_grpc
from router.prepare import check_length
from router.request import (
    WRITE_TIMEOUT_SECONDS,
    Chunk,
    Conversation,
    Finished,
    FinishReason,
    Generates,
    GenerateSpec,
    chat_role,
)
from router.text import ChatMessage

_FOREVER_SECONDS = 1e8
"""What gRPC calls the time remaining of a call without deadline is more than this."""

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}

Context = grpc.aio.ServicerContext[Any, Any]


class Core(Generates, Protocol):
    """What this door needs of the router's core."""

    @property
    def redis_connected(self) -> bool: ...

    def status(self) -> list[inference_pb2.WorkerStatus]: ...


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Behind `ErrorInterceptor`, which makes statuses of what is raised here."""

    def __init__(self, core: Core, write_timeout_seconds: float = WRITE_TIMEOUT_SECONDS) -> None:
        self._core = core
        self._write_timeout = write_timeout_seconds
        self.http_address = ""

    async def Generate(  # type: ignore[override]  # a coroutine that writes: cancelled where it is, it closes its stream
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        for model in self._core.models():  # before anything is copied: a request has room for millions
            check_length(len(request.token_ids.ids), model.max_model_len)
            check_length(len(request.messages.messages), model.max_model_len, "messages")
        spec = spec_from_proto(request, _remaining(context))
        async with aclosing(self._core.generate(spec)) as chunks:
            async for chunk in chunks:
                await self._write(context, chunk_to_proto(chunk, spec.request_id))

    async def _write(self, context: Context, response: inference_pb2.GenerateResponse) -> None:
        """Waits while the client reads slowly. One that has stopped reading would hold its workers for ever."""
        try:
            async with asyncio.timeout(self._write_timeout):
                await context.write(response)
        except TimeoutError:
            raise DeadlineExceeded(f"the client took nothing for {self._write_timeout:g} s") from None
        except grpc.aio.InternalError:  # what becomes of a write when the call ends under it
            raise RequestCancelled("the client left") from None

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=self._models())

    async def GetStatus(
        self, request: inference_pb2.GetStatusRequest, context: Context
    ) -> inference_pb2.GetStatusResponse:
        return inference_pb2.GetStatusResponse(
            workers=self._core.status(),
            models=self._models(),
            redis_connected=self._core.redis_connected,
            http_address=self.http_address,
        )

    def _models(self) -> list[inference_pb2.Model]:
        return [inference_pb2.Model(name=m.name, max_model_len=m.max_model_len) for m in self._core.models()]


def spec_from_proto(request: inference_pb2.GenerateRequest, timeout_seconds: float | None) -> GenerateSpec:
    return GenerateSpec(
        prompt=_prompt(request),
        sampling=SamplingParams.from_proto(request.sampling),
        model=request.model,
        stop=tuple(request.stop),
        request_id=request.request_id or new_request_id(),
        cache_salt=request.cache_salt,
        timeout_seconds=timeout_seconds,
    )


def _prompt(request: inference_pb2.GenerateRequest) -> str | tuple[int, ...] | Conversation:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "messages":
            messages = enumerate(request.messages.messages)
            return Conversation(tuple(_message(place, message) for place, message in messages))
        case _:
            return tuple(request.token_ids.ids)


def _message(place: int, message: inference_pb2.Message) -> ChatMessage:
    shown = f"the string {json.dumps(message.role[:80])}"
    return ChatMessage(role=chat_role(f"messages[{place}].role", message.role, shown), content=message.content)


def chunk_to_proto(chunk: Chunk, request_id: str) -> inference_pb2.GenerateResponse:
    finished = None if chunk.finished is None else _finished_to_proto(chunk.finished, request_id)
    return inference_pb2.GenerateResponse(text=chunk.text, token_ids=chunk.token_ids, finished=finished)


def _finished_to_proto(finished: Finished, request_id: str) -> inference_pb2.Finished:
    usage, timings = finished.usage, finished.timings
    return inference_pb2.Finished(
        reason=_REASONS[finished.reason],
        usage=inference_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        ),
        prefill_worker=finished.prefill_worker,
        decode_worker=finished.decode_worker,
        timings=inference_pb2.Timings(
            first_token_seconds=timings.first_token_seconds,
            total_seconds=timings.total_seconds,
            prefill_seconds=timings.prefill_seconds,
            transfer_seconds=timings.transfer_seconds,
            transfer_blocks=timings.transfer_blocks,
            transfer_bytes=timings.transfer_bytes,
            transport=timings.transport,
            resumes=timings.resumes,
        ),
        stop_string=finished.stop_string,
        request_id=request_id,
    )


def _remaining(context: Context) -> float | None:
    remaining = context.time_remaining()
    if remaining is None or remaining > _FOREVER_SECONDS:
        return None
    return max(remaining, 0.0)
