"""Clients that leave, that read slowly or not at all; opening and closing the door; uvloop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop
from aiohttp import web

from baton.errors import ConfigError, PortInUse
from baton.metrics import Metrics
from router.http import HttpDoor, asked, start_http
from router.request import Chunk
from tests.http.conftest import MAX_BODY_BYTES, Served
from tests.http.fake_core import FakeCore, answer


async def connect(door: HttpDoor, body: dict[str, object], missing: int = 0) -> socket.socket:
    """A raw connection with a request on it, of which nothing is read. `missing`: bytes of the body kept back."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", door.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data) + missing}\r\n\r\n".encode()
    await loop.sock_sendall(client, head + data)
    return client


async def read_until(client: socket.socket, what: bytes) -> bytes:
    got = b""
    while what not in got:
        piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 65536), 5)
        assert piece, f"the connection ended after {got!r}"
        got += piece
    return got


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_closes_its_generations(served: Served, stream: bool, prompt: object) -> None:
    started, never = asyncio.Event(), asyncio.Event()

    def script(spec: object) -> Iterator[Chunk | asyncio.Event]:
        yield answer("a", "b")[0]
        started.set()
        yield never

    served.core.script = script  # type: ignore[assignment]  # an iterator is enough of a sequence here
    client = await connect(served.door, {"prompt": prompt, "stream": stream})
    await asyncio.wait_for(started.wait(), 5)
    client.close()
    while served.core.open:
        served.core.closed.clear()
        await asyncio.wait_for(served.core.closed.wait(), 5)


async def test_a_client_that_reads_nothing_holds_the_answer_back_and_is_cut_off(served: Served) -> None:
    plenty = 100_000
    served.core.script = lambda spec: [Chunk("x" * 60_000, (1,))] * plenty
    client = await connect(served.door, {"prompt": "x", "stream": True})
    await asyncio.wait_for(served.core.closed.wait(), 20)
    assert served.core.produced < plenty / 10  # what the kernel's buffers take, not more
    client.close()


async def test_a_client_that_does_not_take_the_end_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def held_back(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(web.StreamResponse, "write_eof", held_back)
    client = await connect(served.door, {"prompt": "x", "stream": True})
    await read_until(client, b"[DONE]")
    with pytest.raises((ConnectionError, AssertionError), match=r"ended|reset"):
        await read_until(client, b"more")
    client.close()


async def test_a_body_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "_READ_SECONDS", 0.1)
    client = await connect(served.door, {"prompt": "x"}, missing=1)
    got = await read_until(client, b"}}")
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not come within 0.1 s" in got
    client.close()


async def test_a_slow_reader_gets_everything(served: Served) -> None:
    texts = [f"{i:05d}" * 2000 for i in range(100)]
    served.core.script = lambda spec: answer(*texts)
    client = await connect(served.door, {"prompt": "x", "stream": True})
    loop = asyncio.get_running_loop()
    got = b""
    while b"[DONE]" not in got:
        piece = await asyncio.wait_for(loop.sock_recv(client, 1500), 5)
        assert piece
        got += piece
    client.close()
    assert got.count(b"data: ") == len(texts) + 1


async def test_each_token_is_sent_as_it_comes(served: Served) -> None:
    second, third = asyncio.Event(), asyncio.Event()
    chunks = answer("one", "two", "three")
    served.core.script = lambda spec: [chunks[0], second, chunks[1], third, chunks[2]]
    client = await connect(served.door, {"prompt": "x", "stream": True})
    await read_until(client, b"one")
    second.set()
    await read_until(client, b"two")
    third.set()
    await read_until(client, b"[DONE]")
    client.close()


async def test_a_connection_serves_one_request_after_another(served: Served) -> None:
    for stream in (False, True, False):
        async with served.http.post(f"{served.url}/v1/completions", json={"prompt": "x", "stream": stream}) as response:
            await response.read()
            assert response.status == 200
    connector = served.http.connector
    assert connector is not None
    assert len(connector._conns) == 1


async def test_stopping_lets_open_requests_end(served: Served) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()
    core = FakeCore()

    def script(spec: object) -> Iterator[Chunk | asyncio.Event]:
        started.set()
        yield go_on
        yield from answer("done")

    core.script = script  # type: ignore[assignment]  # an iterator is enough of a sequence here
    door = await start_http(core, Metrics(), host="127.0.0.1", port=0, max_body_bytes=MAX_BODY_BYTES)
    asked = asyncio.create_task(served.http.post(f"http://127.0.0.1:{door.port}/v1/completions", json={"prompt": "x"}))
    await asyncio.wait_for(started.wait(), 5)
    stopping = asyncio.create_task(door.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    go_on.set()
    async with await asyncio.wait_for(asked, 5) as response:
        assert (await response.json())["choices"][0]["text"] == "done"
    await asyncio.wait_for(stopping, 5)


async def test_stopping_cancels_what_does_not_end(served: Served) -> None:
    never = asyncio.Event()
    core = FakeCore(lambda spec: [answer("a", "b")[0], never])
    door = await start_http(core, Metrics(), host="127.0.0.1", port=0, max_body_bytes=MAX_BODY_BYTES, drain_seconds=0.1)
    client = await connect(door, {"prompt": "x", "stream": True})
    await read_until(client, b"data: ")
    await asyncio.wait_for(door.stop(), 5)
    assert core.open == 0
    client.close()


async def test_a_port_in_use_is_said(served: Served) -> None:
    with pytest.raises(PortInUse, match=f"port {served.door.port} on 127.0.0.1 is in use.*--http-port"):
        await start_http(
            served.core,
            Metrics(),
            host="127.0.0.1",
            port=served.door.port,
            max_body_bytes=MAX_BODY_BYTES,
        )


async def test_an_address_of_another_machine_is_said(served: Served) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen for HTTP on 192\.0\.2\.1"):
        await start_http(served.core, Metrics(), host="192.0.2.1", port=0, max_body_bytes=MAX_BODY_BYTES)


def on_uvloop(work: Callable[[FakeCore, HttpDoor], Awaitable[None]]) -> None:
    """`work` on the loop that the router runs on."""

    async def main() -> None:
        core = FakeCore()
        door = await start_http(
            core,
            Metrics(),
            host="127.0.0.1",
            port=0,
            max_body_bytes=MAX_BODY_BYTES,
            write_timeout_seconds=0.5,
        )
        await work(core, door)
        await door.stop()
        assert core.open == 0

    uvloop.run(main())


def test_on_uvloop_a_stream_comes_whole() -> None:
    async def work(core: FakeCore, door: HttpDoor) -> None:
        client = await connect(door, {"prompt": "x", "stream": True})
        assert b"Hello" in await read_until(client, b"[DONE]")
        client.close()

    on_uvloop(work)


def test_on_uvloop_a_client_that_leaves_closes_its_generation() -> None:
    async def work(core: FakeCore, door: HttpDoor) -> None:
        never = asyncio.Event()
        core.script = lambda spec: [answer("a", "b")[0], never]
        client = await connect(door, {"prompt": "x", "stream": True})
        await read_until(client, b"data: ")
        client.close()
        await asyncio.wait_for(core.closed.wait(), 5)

    on_uvloop(work)


def test_on_uvloop_a_client_that_reads_nothing_is_cut_off() -> None:
    async def work(core: FakeCore, door: HttpDoor) -> None:
        core.script = lambda spec: [Chunk("x" * 60_000, (1,))] * 100_000
        client = await connect(door, {"prompt": "x", "stream": True})
        await asyncio.wait_for(core.closed.wait(), 20)
        assert core.produced < 10_000
        client.close()

    on_uvloop(work)


def test_on_uvloop_a_port_in_use_is_said() -> None:
    async def work(core: FakeCore, door: HttpDoor) -> None:
        with pytest.raises(PortInUse):
            await start_http(core, Metrics(), host="127.0.0.1", port=door.port, max_body_bytes=MAX_BODY_BYTES)

    on_uvloop(work)
