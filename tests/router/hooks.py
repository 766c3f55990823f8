"""What fake workers do when they are about to report a token, and what tests wait for."""

from __future__ import annotations

import asyncio

from baton.v1 import inference_pb2, worker_pb2
from tests.router.fake_worker import FakeWorker, Hook
from tests.router.system import System

HELLO = tuple(b"hello")


def die_at(index: int) -> Hook:
    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at == index:
            worker.before_token = None
            await worker.kill()
            await asyncio.Event().wait()

    return hook


def wait_for(event: asyncio.Event, index: int = 0) -> Hook:
    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at >= index:
            await event.wait()

    return hook


async def known_busy(system: System, name: str) -> None:
    await system.until(lambda: any(s.load.running for s in system.workers.sessions() if s.peer.key.id == name))


def busy() -> inference_pb2.Load:
    """Of a worker that gets no request while another is there."""
    return inference_pb2.Load(running=100, queued_tokens=1000, available_blocks=1000, total_blocks=1000)
