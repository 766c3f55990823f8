"""One router's stream to this worker: commands in, one Step message a step out. Knows no request's meaning."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from baton.v1 import inference_pb2, worker_pb2, worker_pb2_grpc

if TYPE_CHECKING:
    from worker.core import WorkerCore

log = logging.getLogger(__name__)

_MAX_UNSENT = 100_000  # events; a router that reads so slowly is as good as gone


class Session:
    """What is on its way to one router."""

    def __init__(self) -> None:
        self._events: list[worker_pb2.RequestEvent] = []
        self._next: worker_pb2.Step | None = None
        self._wake = asyncio.Event()
        self._closed = False

    def add(self, event: worker_pb2.RequestEvent) -> None:
        """For the next flush."""
        self._events.append(event)

    def flush(self, load: inference_pb2.Load, draining: bool) -> None:
        """All that was added leaves in one message."""
        if self._events:
            self.put(worker_pb2.Step(events=self._events, load=load, draining=draining))
            self._events = []

    def put(self, step: worker_pb2.Step) -> None:
        """Joins what the stream has not taken yet: a slow reader gets fewer and larger messages, not a longer queue."""
        if self._closed:
            return
        if self._next is None:
            self._next = step
        else:
            self._next.events.extend(step.events)
            self._next.load.CopyFrom(step.load)
            self._next.draining = step.draining
        if len(self._next.events) > _MAX_UNSENT:
            log.warning("a router left %d events unread; its session ends", _MAX_UNSENT)
            self._closed = True
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def take(self) -> worker_pb2.Step | None:
        """What has been put since the last call."""
        step, self._next = self._next, None
        return step

    async def steps(self) -> AsyncIterator[worker_pb2.Step]:
        """Until the session is closed."""
        while not self._closed:
            await self._wake.wait()
            self._wake.clear()
            if (step := self.take()) is not None:
                yield step


_Session = Session  # inside the service, its name is that of the call


class WorkerService(worker_pb2_grpc.WorkerServicer):
    def __init__(self, core: WorkerCore, hello: worker_pb2.Hello) -> None:
        self._core = core
        self._hello = hello

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse],
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        session = _Session()
        self._core.open_session(session)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            yield worker_pb2.SessionResponse(hello=self._hello)
            async for step in session.steps():
                yield worker_pb2.SessionResponse(step=step)
        finally:
            reader.cancel()
            self._core.close_session(session)

    async def _read(self, session: _Session, requests: AsyncIterator[worker_pb2.SessionRequest]) -> None:
        try:
            async for message in requests:
                self._core.receive(session, message)
        except grpc.RpcError as error:
            log.info("a router's session broke: %s", error)
        except Exception:
            log.exception("a message could not be handled; its session ends")
        finally:
            session.close()
