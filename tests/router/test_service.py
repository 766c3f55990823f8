"""The gRPC door over real sockets: messages, statuses, deadlines, health, reflection, drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.client import Client, Message
from baton.config import RouterConfig, RoutingConfig
from baton.errors import CheckpointError, InvalidRequest, PortInUse, PromptTooLong
from baton.rpc import LIVENESS
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2, inference_pb2_grpc
from router.interceptor import ErrorInterceptor
from router.request import Chunk
from router.server import RouterServer
from router.service import InferenceService
from router.text import Tokenizer
from tests.http.fake_core import FakeCore
from tests.router.fake_worker import FakeWorker, expected_tokens
from tests.router.system import FAST, FakeDirectory, byte_tokenizer, chatty, decode, prefill, unified

SERVICE = "baton.v1.Inference"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Door:
    def __init__(self, server: RouterServer, channel: grpc.aio.Channel, directory: FakeDirectory) -> None:
        self.server = server
        self.channel = channel
        self.directory = directory
        self.stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self.health = health_pb2_grpc.HealthStub(channel)

    async def generate(self, timeout: float | None = None, **fields: Any) -> list[inference_pb2.GenerateResponse]:
        sampling = inference_pb2.SamplingParams(max_tokens=8, seed=0)
        request = inference_pb2.GenerateRequest(**({"text": "hello", "sampling": sampling} | fields))
        return [response async for response in self.stub.Generate(request, timeout=timeout)]

    async def until_health(self, wanted: int) -> None:
        async with asyncio.timeout(10):
            async for response in self.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)):
                if response.status == wanted:
                    return


@asynccontextmanager
async def open_door(
    *workers: FakeWorker,
    wait: bool = True,
    load_tokenizer: Callable[[str], Tokenizer] = byte_tokenizer,
    **config: Any,
) -> AsyncIterator[Door]:
    directory = FakeDirectory()
    for worker in workers:
        await worker.start()
    directory.list(*workers)
    settings = {"grpc_port": 0, "http_port": 0, "routing": RoutingConfig(local_prefill_tokens=3)} | config
    server = RouterServer(RouterConfig(**settings), directory, FAST, load_tokenizer=load_tokenizer)
    try:
        await server.start()
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            door = Door(server, channel, directory)
            if wait:
                await door.until_health(SERVING)
            yield door
    finally:
        await server.stop()
        for worker in workers:
            await worker.kill()


async def test_generate_streams_text_and_ids_and_ends_with_finished() -> None:
    async with open_door(prefill(cached_tokens=4), decode()) as door:
        responses = await door.generate(request_id="mine")
    tokens = tuple(t for r in responses for t in r.token_ids)
    assert tokens == expected_tokens(tuple(b"hello"), 8)
    assert "".join(r.text for r in responses) == bytes(tokens).decode()
    assert [r.HasField("finished") for r in responses] == [False] * (len(responses) - 1) + [True]
    finished = responses[-1].finished
    assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert finished.request_id == "mine"
    assert (finished.prefill_worker, finished.decode_worker) == ("P", "D")
    assert (finished.usage.prompt_tokens, finished.usage.cached_tokens) == (5, 4)
    assert finished.timings.transfer_blocks == 3


async def test_token_ids_are_a_prompt_and_a_request_id_is_made_up() -> None:
    async with open_door(unified()) as door:
        responses = await door.generate(text=None, token_ids=inference_pb2.TokenIds(ids=[1, 2]))
    assert tuple(t for r in responses for t in r.token_ids) == expected_tokens((1, 2), 8)
    assert responses[-1].finished.request_id.startswith("req-")


async def test_messages_become_the_prompt_that_the_http_door_makes_of_them() -> None:
    said = [("developer", "Be brief."), ("user", "hi"), ("assistant", "Hi."), ("user", "größe?")]
    worker = unified()
    async with open_door(worker, load_tokenizer=chatty) as door, aiohttp.ClientSession() as session:
        await door.generate(text=None, messages=conversation(*said))
        async with Client(door.server.grpc_address) as client:
            await client.answer([Message(role, content) for role, content in said], SamplingParams(max_tokens=2))
        body = {"messages": [{"role": role, "content": content} for role, content in said], "max_tokens": 2}
        async with session.post(f"http://{door.server.http_address}/v1/chat/completions", json=body) as response:
            assert response.status == 200
    prompts = {bytes(submit.token_ids).decode() for submit in worker.submits}
    assert prompts == {"system:Be brief.;user:hi;assistant:Hi.;user:größe?;>"}
    assert len(worker.submits) == 3


INVALID, TOO_LONG = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        ([], INVALID, "messages is empty; it must have at least one message"),
        (
            [("user", "hi"), ("robot", "hi")],
            INVALID,
            'messages[1].role is the string "robot"; it must be one of system, devel',
        ),
        ([("", "hi")], INVALID, 'messages[0].role is the string ""'),
        ([("x" * 5000, "hi")], INVALID, "it must be one of"),
        ([("user", "no")], INVALID, "the model's chat template does not take these messages: not that"),
        ([("user", "")] * 512, TOO_LONG, "prompt has 512 messages; the model takes 512 tokens"),
        ([("user", "x" * 600)], TOO_LONG, "tokens; the model takes 512 tokens of prompt and answer together"),
    ],
)
async def test_messages_that_cannot_be_taken_say_which_and_why(
    said: list[tuple[str, str]], status: grpc.StatusCode, says: str
) -> None:
    async with open_door(unified(), load_tokenizer=chatty) as door:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await door.generate(text=None, messages=conversation(*said))
        assert refused.value.code() is status
        assert says in refused.value.details()
        assert (await door.generate())[-1].finished.usage.completion_tokens == 8


async def test_a_model_without_chat_template_says_what_else_can_be_sent() -> None:
    async with open_door(unified()) as door, Client(door.server.grpc_address) as client:
        with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions, or `text` over gRPC"):
            await client.answer([Message("user", "hi")])


async def test_the_client_is_told_which_field_is_wrong() -> None:
    async with open_door(unified()) as door, Client(door.server.grpc_address) as client:
        for prompt, options, kind, param in (
            ("x" * 600, {}, PromptTooLong, "prompt"),
            ("x", {"stop": [""]}, InvalidRequest, "stop"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                await client.answer(prompt, **options)
            assert (type(refused.value), refused.value.param) == (kind, param)


def conversation(*said: tuple[str, str]) -> inference_pb2.Messages:
    messages = [inference_pb2.Message(role=role, content=content) for role, content in said]
    return inference_pb2.Messages(messages=messages)


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"text": ""}, INVALID, "prompt is empty"),
        ({"text": "x" * 600}, TOO_LONG, "prompt has 600 tokens; the model takes 512"),
        ({"text": "x" * 9000}, TOO_LONG, "prompt has 9000 characters, which is more than 512"),
        ({"text": "x" * 401}, TOO_LONG, "a prompt of at most 400"),
        ({"text": None}, INVALID, "prompt is empty"),
        ({"model": "huge"}, grpc.StatusCode.NOT_FOUND, "the served model is 'tiny'"),
        ({"model": "größe" * 1000}, grpc.StatusCode.NOT_FOUND, "größe"),
        (
            {"sampling": inference_pb2.SamplingParams(temperature=float("nan"))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature is nan; it must be between 0 and 100",
        ),
        ({"text": "x" * 70_000}, grpc.StatusCode.RESOURCE_EXHAUSTED, "65536"),
    ],
)
async def test_what_is_wrong_has_its_status_and_says_what_would_be_right(
    fields: dict[str, Any], status: grpc.StatusCode, says: str
) -> None:
    async with open_door(unified(), max_message_bytes=65536) as door:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await door.generate(**fields)
        assert refused.value.code() is status
        assert says in refused.value.details()
        assert (await door.generate())[-1].finished.usage.completion_tokens == 8


async def test_strings_that_are_not_utf8_are_an_invalid_argument() -> None:
    async with open_door(unified()) as door:
        call = door.channel.unary_stream(f"/{SERVICE}/Generate")(b"\x12\x02\xff\xfe")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "all strings in UTF-8" in refused.value.details()


async def test_a_defect_shows_a_reference_and_nothing_of_the_inside(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_door(unified()) as door:
        monkeypatch.setattr(door.server.relay, "_prepare", None)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await door.generate()
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    reference = failed.value.details().split()[-1]
    assert failed.value.details() == f"internal error; the router's log has it as {reference}"
    assert reference in caplog.text
    assert "NoneType" in caplog.text


async def test_the_calls_deadline_is_the_requests() -> None:
    async def stall(*_: object) -> None:
        await asyncio.Event().wait()

    worker = unified(before_token=stall)
    async with open_door(worker) as door:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await door.generate(timeout=0.3)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0 < worker.submits[0].deadline_seconds < 0.35  # gRPC rounds
        await worker.until(lambda: len(worker.cancels) == 1)

        worker.before_token = None
        await door.generate()
        assert worker.submits[-1].deadline_seconds > 500  # the router's own default


async def test_a_client_that_cancels_frees_the_worker() -> None:
    async def stall(_: object, __: object, index: int) -> None:
        if index == 3:
            await asyncio.Event().wait()

    worker = unified(before_token=stall)
    async with open_door(worker) as door:
        call = door.stub.Generate(
            inference_pb2.GenerateRequest(text="hello", sampling=inference_pb2.SamplingParams(max_tokens=8))
        )
        await call.read()
        call.cancel()
        await worker.until(lambda: len(worker.cancels) == 1)
        async with asyncio.timeout(5):
            await door.server.relay._idle.wait()


@asynccontextmanager
async def unread_stream(timeout: float | None, write_timeout: float) -> AsyncIterator[tuple[FakeCore, Any]]:
    """A call that answers without end, of which one message is read; more were written than fit on the way."""
    core = FakeCore(lambda spec: [Chunk("x" * 60_000, (1,))] * 100_000)
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    service = InferenceService(core, write_timeout)  # type: ignore[arg-type]  # Generate is all that is called
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]  # generated without types
        call = stub.Generate(inference_pb2.GenerateRequest(text="hello"), timeout=timeout)
        await call.read()
        produced = 0
        while core.produced > produced:  # until a write is held back
            produced = core.produced
            await asyncio.sleep(0.1)
        yield core, call
    await server.stop(None)


async def read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_client_that_stops_reading_is_cut_off_and_told_so() -> None:
    async with unread_stream(timeout=None, write_timeout=0.5) as (core, call):
        await asyncio.wait_for(core.closed.wait(), 10)
        assert core.open == 0
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await read_on(call)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ended.value.details() == "the client took nothing for 0.5 s"


@pytest.mark.parametrize("timeout", [1.0, None], ids=["its deadline passes", "it leaves"])
async def test_a_client_that_goes_while_it_is_written_to_is_no_internal_error(
    timeout: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with unread_stream(timeout, write_timeout=30.0) as (core, call):
        if timeout is None:
            call.cancel()
        await asyncio.wait_for(core.closed.wait(), 10)
    assert "internal error" not in caplog.text


async def test_models_and_status_show_the_system() -> None:
    async with open_door(prefill(), decode()) as door:
        models = await door.stub.ListModels(inference_pb2.ListModelsRequest())
        assert [(m.name, m.max_model_len) for m in models.models] == [("tiny", 512)]
        async with asyncio.timeout(5):
            while True:
                status = await door.stub.GetStatus(inference_pb2.GetStatusRequest())
                if all(w.state == inference_pb2.WORKER_STATE_READY and w.load.total_blocks for w in status.workers):
                    break
        assert [(w.id, w.role, w.pid) for w in status.workers] == [
            ("D", inference_pb2.WORKER_ROLE_DECODE, 42),
            ("P", inference_pb2.WORKER_ROLE_PREFILL, 42),
        ]
        assert status.redis_connected
        assert status.http_address == door.server.http_address
        assert status.models == models.models


async def test_health_says_whether_requests_can_be_served() -> None:
    async with open_door(prefill(), wait=False) as door:
        await door.until_health(NOT_SERVING)
        worker = await decode().start()
        door.directory.list(worker)
        await door.until_health(SERVING)
        overall = await door.health.Check(health_pb2.HealthCheckRequest())
        assert overall.status == SERVING
        await worker.kill()
        await door.until_health(NOT_SERVING)


async def test_reflection_lists_the_service() -> None:
    async with open_door(unified()) as door:
        stub = reflection_pb2_grpc.ServerReflectionStub(door.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
        names = {service.name for service in response.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_draining_lets_open_streams_end_and_turns_others_away() -> None:
    go_on = asyncio.Event()

    async def wait(*_: object) -> None:
        await go_on.wait()

    worker = unified(before_token=wait)
    async with open_door(worker) as door:
        first = asyncio.create_task(door.generate())
        await worker.until(lambda: bool(worker.submits))
        draining = asyncio.create_task(door.server.drain())
        await door.until_health(NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await door.generate()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in refused.value.details()
        alive = await door.health.Check(health_pb2.HealthCheckRequest(service=LIVENESS))
        assert alive.status == SERVING
        go_on.set()
        await draining
        assert (await first)[-1].finished.usage.completion_tokens == 8


async def test_streams_that_outlast_the_drain_are_told_why_by_both_doors() -> None:
    async def stall(_: object, __: object, index: int) -> None:
        if index == 3:
            await asyncio.Event().wait()

    worker = unified(before_token=stall)
    body = {"prompt": "hello", "max_tokens": 8, "stream": True}
    async with open_door(worker, drain_seconds=0.1) as door, aiohttp.ClientSession() as session:
        by_grpc = asyncio.create_task(door.generate())
        async with session.post(f"http://{door.server.http_address}/v1/completions", json=body) as response:
            await response.content.readuntil(b"\n\n")
            await worker.until(lambda: len(worker.submits) == 2)
            await door.server.drain()
            stopping = asyncio.create_task(door.server.stop())
            rest = (await response.read()).decode()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await by_grpc
        await stopping
    assert "the router is shutting down" in rest.split("data: ")[-1]
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in (ended.value.details() or "")
    assert door.server.relay.open_requests == 0


async def test_both_doors_serve_the_same_core() -> None:
    body = {"prompt": "hello", "max_tokens": 8, "seed": 0, "temperature": 0}
    async with open_door(prefill(), decode()) as door, aiohttp.ClientSession() as session:
        base = f"http://{door.server.http_address}"
        async with session.post(f"{base}/v1/completions", json=body) as response:
            answer = await response.json()
        async with session.get(f"{base}/metrics") as response:
            metrics = await response.text()
    assert answer["choices"][0]["text"] == bytes(expected_tokens(tuple(b"hello"), 8)).decode()
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in metrics
    assert "baton_redis_up 1.0" in metrics


@pytest.mark.parametrize("flag", ["grpc_port", "http_port"])
async def test_a_port_in_use_is_an_error_that_names_the_flag(flag: str) -> None:
    async with open_door(unified()) as door:
        address = door.server.grpc_address if flag == "grpc_port" else door.server.http_address
        port = int(address.rpartition(":")[2])
        with pytest.raises(PortInUse, match=f"{port}.*--{flag.replace('_', '-')}"):
            async with open_door(**{flag: port}):
                pass


async def test_a_model_without_tokenizer_keeps_the_router_from_starting(tmp_path: object) -> None:
    server = RouterServer(RouterConfig(model=str(tmp_path), grpc_port=0, http_port=0), FakeDirectory())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        await server.start()
    await server.stop()
