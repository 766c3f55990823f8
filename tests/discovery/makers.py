"""What the tests put into Redis."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import hiredis

from baton.ids import BlockHash, Incarnation, WorkerId
from discovery import WorkerRecord, WorkerRole
from discovery.keys import Keys, block_name


def record(worker: str = "decode-0", incarnation: int = 7, **fields: Any) -> WorkerRecord:
    given: dict[str, Any] = {
        "id": WorkerId(worker),
        "incarnation": Incarnation(incarnation),
        "role": WorkerRole.DECODE,
        "address": "127.0.0.1:7001",
        "metrics": "127.0.0.1:9001",
        "pid": 4321,
        "model": "baton-tiny",
        "block_size": 16,
        "model_fingerprint": b"\x00weights\xff",
    }
    return WorkerRecord(**(given | fields))


def block(i: int) -> BlockHash:
    """A hash whose published name can be read in MONITOR's output."""
    return BlockHash(f"{i:016d}".encode() * 2)


def blocks(*args: int) -> list[BlockHash]:
    return [block(i) for i in range(*args)]


def names(hashes: list[BlockHash]) -> set[bytes]:
    return {block_name(block_hash) for block_hash in hashes}


def blocks_key(namespace: str, worker: WorkerRecord) -> str:
    return Keys(namespace).blocks(worker.id, worker.incarnation)


@contextlib.asynccontextmanager
async def false_server(answer: Callable[[list[bytes]], bytes]) -> AsyncIterator[str]:
    """Speaks enough RESP to be asked anything, and answers what `answer` says (nothing: hangs up). Gives its URL."""

    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.create_task(serve(reader, writer)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while data := await reader.read(65536):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    reply = b"+OK\r\n" if command[0] == b"CLIENT" else answer(command)
                    if not reply:
                        return
                    writer.write(reply)
                await writer.drain()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next turn
