"""A prefill worker whose pool is full of transfers that nobody comes for any more serves again as their lease runs out.

A real worker process, and this test in the place of its router and of its pullers.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from baton import model_in_the_box
from baton.rpc import CHANNEL_OPTIONS
from baton.sampling import SamplingParams
from baton.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.faults.parts import Process
from tests.faults.sockets import free_ports

HOST = "127.0.0.1"
LEASE = 2.0
BAR = LEASE + 1.0
BUSY_MACHINE = 2.0
BLOCKS, BLOCK = 128, 16
EACH = 16
"""Blocks of one prompt."""
PROMPTS = BLOCKS // EACH


class Router:
    """This test's session with the worker."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.events: asyncio.Queue[worker_pb2.RequestEvent] = asyncio.Queue()

    async def read(self) -> None:
        while isinstance(message := await self._call.read(), worker_pb2.SessionResponse):
            for event in message.step.events:
                self.events.put_nowait(event)

    async def submit(self, name: str, blocks: int) -> None:
        rng = random.Random(name)
        ids = [rng.randrange(10, 1000) for _ in range(blocks * BLOCK)]
        await self._call.write(worker_pb2.SessionRequest(submit=worker_pb2.Submit(
            id=worker_pb2.AttemptId(request_id=name, attempt=1), task=worker_pb2.TASK_PREFILL, token_ids=ids,
            num_prompt_tokens=len(ids), sampling=SamplingParams(max_tokens=8, seed=0, ignore_eos=True).to_proto(),
        )))  # fmt: skip

    async def hear(self, kind: str, name: str = "") -> worker_pb2.RequestEvent:
        """The next event of this kind, of this request or of any; others are passed over."""
        async with asyncio.timeout(30):
            while True:
                event = await self.events.get()
                if event.WhichOneof("event") == kind and name in ("", event.id.request_id):
                    return event


@asynccontextmanager
async def prefill_worker(directory: Path, transport: str) -> AsyncIterator[tuple[grpc.aio.Channel, Router]]:
    port, metrics_port = free_ports(random.Random(directory.name), 2, [HOST])
    argv = [
        "prefill_worker", "--worker-id=prefill-0", f"--grpc-port={port}", f"--metrics-port={metrics_port}",
        f"--model={model_in_the_box.DIRECTORY}", f"--kv-blocks={BLOCKS}", f"--lease-seconds={LEASE}",
        f"--transport={transport}", "--threads=1", "--dtype=float32",
    ]  # fmt: skip
    worker = Process("prefill-0", argv, directory / "prefill-0.log")
    await worker.start()
    try:
        async with asyncio.timeout(120):
            await worker.ready.wait()
        async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=CHANNEL_OPTIONS) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Session()
            router = Router(call)
            reading = asyncio.create_task(router.read())
            yield channel, router
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert not worker.defects
    finally:
        await worker.end(signal.SIGKILL)


async def claim_and_fall_silent(channel: grpc.aio.Channel, ticket: transfer_pb2.Ticket, stack: AsyncExitStack) -> None:
    """The stream stays open, and nobody renews or releases."""
    call = transfer_pb2_grpc.TransferStub(channel).Pull()
    stack.callback(call.cancel)
    await call.write(transfer_pb2.PullRequest(claim=transfer_pb2.Claim(
        transfer_id=ticket.transfer_id, incarnation=ticket.incarnation, request_id=ticket.request_id,
        attempt=ticket.attempt, layout_fingerprint=ticket.layout_fingerprint, layout=ticket.layout,
        worker_id="decode-0",
    )))  # fmt: skip
    answer = await call.read()
    assert answer.WhichOneof("message") == "claimed", answer


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_pool_full_of_abandoned_transfers_serves_again(transport: str, tmp_path: Path) -> None:
    async with prefill_worker(tmp_path, transport) as (channel, router):
        for claimed in (0, PROMPTS // 2, PROMPTS):
            took = await abandon(channel, router, claimed)
            print(f"{transport}, {claimed} of {PROMPTS} claimed: serves again after {took:.2f} s (bar {BAR:g} s)")
            assert took <= BAR + BUSY_MACHINE
            assert took > LEASE / 2, "the pool was not full of live offers"


async def abandon(channel: grpc.aio.Channel, router: Router, claimed: int) -> float:
    """Seconds until a request is served that needs nearly all blocks of a pool that is full of offers."""
    async with AsyncExitStack() as stack:
        tickets = []
        for number in range(PROMPTS):
            await router.submit(f"abandoned-{claimed}-{number}", EACH)
            tickets.append((await router.hear("ticket")).ticket)
        for ticket in tickets[:claimed]:
            await claim_and_fall_silent(channel, ticket, stack)
        abandoned = time.monotonic()
        await router.submit(f"next-{claimed}", BLOCKS - 1)
        await router.hear("tokens", f"next-{claimed}")
        took = time.monotonic() - abandoned
        await router.hear("ended", f"next-{claimed}")
    return took
