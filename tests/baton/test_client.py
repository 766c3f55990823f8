"""What the client refuses by itself: whatever is wrong, it says so as a BatonError, before anything is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.client import Client, Message
from baton.errors import BatonError, ConfigError, InvalidRequest, Unavailable
from baton.rpc import PARAM_METADATA
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2, inference_pb2_grpc


@pytest.mark.parametrize(
    ("prompt", "sampling", "options", "says"),
    [
        ("hi", SamplingParams(max_tokens=-1), {}, "max_tokens is -1; it must be at least 1"),
        ("hi", SamplingParams(max_tokens=2**32), {}, "cannot be sent"),
        ("hi", SamplingParams(seed=-1), {}, "seed is -1"),
        ("hi", SamplingParams(stop_token_ids=(2**32,)), {}, "stop_token_ids is 4294967296"),
        ("a\ud800", None, {}, "cannot be sent"),
        ("hi", None, {"stop": ["\ud800"]}, "cannot be sent"),
        ("hi", None, {"model": "\ud800"}, "cannot be sent"),
        ([1, -1], None, {}, "cannot be sent"),
        ([1, 1.5], None, {}, "cannot be sent"),
        ("hi", None, {"cache_salt": "text"}, "cannot be sent"),
        ([Message("user", "a\ud800")], None, {}, "cannot be sent"),
        ([Message("user", "hi"), 1], None, {}, "cannot be sent"),
        ([1, Message("user", "hi")], None, {}, "cannot be sent"),
    ],
)
async def test_what_cannot_be_sent_is_an_invalid_request(
    prompt: Any, sampling: SamplingParams | None, options: dict[str, Any], says: str
) -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match=says):
            await client.answer(prompt, sampling, **options)


class _Fails(inference_pb2_grpc.InferenceServicer):
    def __init__(self, *status: Any) -> None:
        self.status = status
        self.asked: list[inference_pb2.GenerateRequest] = []

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # gRPC's stub is sync
        self.asked.append(request)
        await context.abort(*self.status)


@asynccontextmanager
async def failing(*status: Any) -> AsyncIterator[tuple[_Fails, Client]]:
    server, fails = grpc.aio.server(), _Fails(*status)
    inference_pb2_grpc.add_InferenceServicer_to_server(fails, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}") as client:
        yield fails, client
    await server.stop(None)


async def test_a_salt_is_sent_and_a_failed_precondition_is_a_wrong_configuration() -> None:
    async with failing(grpc.StatusCode.FAILED_PRECONDITION, "no tokenizer") as (fails, client):
        with pytest.raises(BatonError, match="no tokenizer") as failed:
            await client.answer("hi", cache_salt=b"tenant")
    assert isinstance(failed.value, ConfigError)
    assert [request.cache_salt for request in fails.asked] == [b"tenant"]


async def test_a_router_that_went_away_is_told_from_one_that_can_serve_nobody() -> None:
    ours = ((PARAM_METADATA, ""),)
    async with failing(grpc.StatusCode.UNAVAILABLE, "no decode worker", ours) as (_, client):
        with pytest.raises(Unavailable, match=r"^no decode worker$"):
            await client.answer("hi")
    async with failing(grpc.StatusCode.UNAVAILABLE, "Socket closed") as (_, client):
        with pytest.raises(Unavailable, match=rf"^the router at {client.target} went away: Socket closed$"):
            await client.answer("hi")
