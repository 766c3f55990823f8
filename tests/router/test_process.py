"""`serve` as a process of its own, with a real Redis: ready line, discovery, loss of Redis, SIGTERM, bad starts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc
from discovery import EmbeddedRedis, Registration, connect
from tests.router.fake_worker import expected_tokens
from tests.router.system import save_byte_tokenizer, unified

ROOT = Path(__file__).resolve().parents[2]
_MAIN = """
import asyncio, sys
from baton.config import RouterConfig, parse
from baton.errors import ConfigError
from router.server import serve
assert "torch" not in sys.modules, "the router imports no torch"
try:
    asyncio.run(serve(parse(RouterConfig, sys.argv[1:], prog="router")))
except ConfigError as error:
    sys.exit(f"{type(error).__name__}: {error}")
assert "torch" not in sys.modules, "the router imports no torch, not even with its tokenizer loaded"
"""


@asynccontextmanager
async def router(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _MAIN, "--http-port=0", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def address_in_ready_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        line = (await process.stdout.readline()).decode()
    match = re.fullmatch(r"baton router ready grpc=(127\.0\.0\.1:\d+) http=127\.0\.0\.1:\d+\n", line)
    assert match, f"ready line is {line!r}"
    return match[1]


async def generate(address: str) -> tuple[int, ...]:
    sampling = inference_pb2.SamplingParams(max_tokens=8, seed=0)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Generate(inference_pb2.GenerateRequest(text="hello", sampling=sampling), timeout=20)
        return tuple([token async for response in call for token in response.token_ids])


async def test_a_router_serves_through_the_loss_of_redis_and_ends_on_sigterm(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    worker = await unified().start()
    with EmbeddedRedis() as server:
        redis = await connect(server.url)
        registration = Registration(redis, worker.record)
        await registration.start()
        async with router("--grpc-port=0", f"--model={tmp_path}", f"--redis-url={server.url}") as process:
            address = await address_in_ready_line(process)
            assert await generate(address) == expected_tokens(tuple(b"hello"), 8)
            await registration.stop()
            await redis.aclose()
            server.stop()
            assert await generate(address) == expected_tokens(tuple(b"hello"), 8)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                _, stderr = await process.communicate()
            assert process.returncode == 0, stderr.decode()
    await worker.kill()


async def test_redis_that_is_not_there_at_start_is_a_clear_error() -> None:
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        async with router("--grpc-port=0", f"--redis-url={url}") as process:
            _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode().startswith(f"RedisUnreachable: Redis at {url} is unreachable")


async def test_a_port_in_use_at_start_is_a_clear_error() -> None:
    with EmbeddedRedis() as server, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with router(f"--grpc-port={port}", f"--redis-url={server.url}") as process:
            _, stderr = await process.communicate()
    assert process.returncode == 1
    assert re.search(f"PortInUse: cannot listen on 127.0.0.1:{port}.*--grpc-port", stderr.decode())
