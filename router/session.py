"""One worker's session: one channel, one multiplexed stream for all requests. Owns its connection and nothing else.

    CONNECTING ──► STANDING ──► BROKEN ──► STANDING …          CLOSED: from anywhere, by `close`
               └► BROKEN: cannot be reached, or is not a worker that this router can use

A reader task sorts what the worker says into the inboxes of the attempts; a writer task sends what is queued. When the
stream breaks, every open attempt hears `Lost` at once. A peer that is stopped while its TCP connection stays open is
found dead by keepalive pings. It never chooses a worker and never retries a request.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import grpc

from baton.clock import Clock
from baton.errors import Unavailable, WorkerLost
from baton.ids import AttemptId
from baton.metrics import RouterMetrics
from baton.rpc import OpenChannel, channel_options, open_channel
from baton.v1 import inference_pb2, transfer_pb2, worker_pb2, worker_pb2_grpc
from router.events import Inbox, Lost, Side
from router.placement import Role, WorkerKey
from router.session_attempts import SessionAttempts

_log = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]


class Link(Enum):
    CONNECTING = auto()
    STANDING = auto()
    BROKEN = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class SessionOptions:
    keepalive_seconds: float = 5.0
    """Half of what other channels take: until a silent worker is found dead, its streams stand still."""
    keepalive_timeout_seconds: float = 5.0
    hello_seconds: float = 10.0
    first_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 2.0
    max_queued_messages: int = 16384
    """Unsent messages at which a worker takes no new request."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a worker is said to be and who it is said to be."""

    key: WorkerKey
    role: Role
    address: str
    metrics: str = ""
    pid: int = 0


class WorkerSession:
    """`accept` looks at a Hello and gives the reason why the worker cannot be used, or an empty string."""

    def __init__(
        self,
        peer: Peer,
        *,
        accept: Callable[[WorkerSession, worker_pb2.Hello], str],
        on_change: Callable[[], None],
        metrics: RouterMetrics,
        clock: Clock,
        options: SessionOptions,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.peer = peer
        self.link = Link.CONNECTING
        self.detail = "is being connected"
        """Why it takes no requests."""
        self.hello: worker_pb2.Hello | None = None
        """Of the last session that stood."""
        self.load = inference_pb2.Load()
        self.draining = False
        self.attempts = SessionAttempts(peer.key, metrics, clock)
        self._accept = accept
        self._on_change = on_change
        self._options = options
        self._open_channel = open_channel
        self._recent = [0, 0]
        self._unsent: deque[worker_pb2.SessionRequest] = deque()
        self._to_send = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"session {peer.key.id}")

    @property
    def name(self) -> str:
        return f"{self.peer.key.id} ({self.peer.address})"

    @property
    def standing(self) -> bool:
        return self.link is Link.STANDING

    @property
    def recent_tokens(self) -> int:
        """Tokens submitted since the last report of load but one: the last may not have counted them yet."""
        return sum(self._recent)

    async def close(self) -> None:
        self._become(Link.CLOSED, "is gone")
        self.attempts.lose_all(Lost(f"worker {self.peer.key.id} is gone"))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # --- what the relay does with it

    def open(self, submit: worker_pb2.Submit, side: Side, inbox: Inbox) -> None:
        """Sends a request's attempt; its events go to `inbox` until `abandon`. Raises WorkerLost, Unavailable."""
        if not self.standing:
            raise WorkerLost(f"worker {self.peer.key.id} is not connected")
        if len(self._unsent) >= self._options.max_queued_messages:
            raise Unavailable(f"worker {self.peer.key.id} does not read: {len(self._unsent)} messages wait for it")
        attempt = AttemptId(submit.id.request_id, submit.id.attempt)
        self.attempts.add(attempt, side, inbox)
        self._recent[0] += len(submit.token_ids)
        self._send(worker_pb2.SessionRequest(submit=submit))

    def handoff(self, attempt: AttemptId, ticket: transfer_pb2.Ticket) -> None:
        if attempt in self.attempts:
            handoff = worker_pb2.Handoff(id=_id(attempt), ticket=ticket)
            self._send(worker_pb2.SessionRequest(handoff=handoff))

    def move(self, attempt: AttemptId) -> None:
        """Asks the worker to let the attempt's stream go on elsewhere."""
        if attempt in self.attempts:
            self._send(worker_pb2.SessionRequest(move=worker_pb2.Move(id=_id(attempt))))

    def abandon(self, attempt: AttemptId, *, cancel: bool) -> None:
        """No more events of it are wanted; with `cancel` the worker is told to give it up."""
        if self.attempts.remove(attempt) and cancel:
            self._send(worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(id=_id(attempt))))

    def _send(self, message: worker_pb2.SessionRequest) -> None:
        if self.standing:
            self._unsent.append(message)
            self._to_send.set()

    # --- its connection

    async def _run(self) -> None:
        backoff = self._options.first_backoff_seconds
        while True:
            try:
                await self._connect_and_serve()
            except grpc.aio.AioRpcError as error:
                reason = f"cannot be reached: {_words(error)}"
            except TimeoutError:
                reason = f"sent no Hello within {self._options.hello_seconds:g} s"
            except (_RefusedPeer, _StreamEnded) as error:
                reason = error.args[0]
            except Exception as error:  # a defect in reading must break this session, not end it for good
                _log.exception("session to worker %s failed", self.name)
                reason = f"session failed: {error!r}"
            stood = self.standing
            self._broken(reason)
            backoff = self._options.first_backoff_seconds if stood else backoff
            await asyncio.sleep(backoff * random.uniform(0.75, 1.25))
            backoff = min(backoff * 2, self._options.max_backoff_seconds)

    async def _connect_and_serve(self) -> None:
        options = channel_options(self._options.keepalive_seconds, self._options.keepalive_timeout_seconds)
        async with self._open_channel(self.peer.address, options) as channel:
            call: Call = worker_pb2_grpc.WorkerStub(channel).Session()
            try:
                async with asyncio.timeout(self._options.hello_seconds):
                    first = await self._receive(call)
                self._greet(first)
                await self._serve(call)
            finally:
                call.cancel()

    async def _serve(self, call: Call) -> None:
        """Until the stream ends, which it raises."""
        reader = asyncio.create_task(self._read(call), name=f"reader {self.peer.key.id}")
        writer = asyncio.create_task(self._write(call), name=f"writer {self.peer.key.id}")
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in (reader, writer):
                task.cancel()
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def _greet(self, first: worker_pb2.SessionResponse) -> None:
        hello = first.hello
        if first.WhichOneof("message") != "hello":
            problem = "began its session without a Hello"
        elif hello.worker_id != self.peer.key.id or hello.incarnation != self.peer.key.incarnation:
            problem = (
                f"answers as {hello.worker_id!r} of incarnation {hello.incarnation}; "
                f"{self.peer.key.id!r} of incarnation {self.peer.key.incarnation} was expected"
            )
        elif hello.role != self.peer.role.value:
            problem = f"says its role is {hello.role}; the directory says {self.peer.role.name.lower()}"
        else:
            problem = self._accept(self, hello)
        if problem:
            raise _RefusedPeer(problem)
        self.hello = hello
        self.draining = False
        self.load = inference_pb2.Load()
        self._recent = [0, 0]
        self._unsent.clear()
        self._become(Link.STANDING, "")
        _log.info("worker %s is there, as %s", self.name, self.peer.role.name.lower())

    async def _read(self, call: Call) -> None:
        while True:
            response = await self._receive(call)
            if response.WhichOneof("message") != "step":
                self.attempts.count_stale("malformed")
                continue
            step = response.step
            self.attempts.deliver(step.events)
            if step.HasField("load"):
                self.load = step.load
                self._recent = [0, self._recent[0]]
            if step.draining != self.draining:
                self.draining = step.draining
                self._on_change()
                if self.draining:
                    self.attempts.drain_began()

    async def _receive(self, call: Call) -> worker_pb2.SessionResponse:
        try:
            response: Any = await call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # How gRPC tells of status CANCELLED, also when it was the peer who said it.
            raise _StreamEnded("cancelled its session") from None
        if response is not grpc.aio.EOF:
            return response  # type: ignore[no-any-return]  # read gives a message or EOF
        code = await call.code()
        if code is grpc.StatusCode.OK:
            raise _StreamEnded("ended its session")
        raise grpc.aio.AioRpcError(
            code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )

    async def _write(self, call: Call) -> None:
        try:
            while True:
                while self._unsent:
                    await call.write(self._unsent.popleft())
                self._to_send.clear()
                await self._to_send.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call is over; the reader sees why

    def _broken(self, reason: str) -> None:
        if self.standing:
            _log.warning("worker %s was lost: %s", self.name, reason)
        elif reason != self.detail:
            _log.info("worker %s %s", self.name, reason)
        self._unsent.clear()
        self._become(Link.BROKEN, reason)
        self.attempts.lose_all(Lost(f"worker {self.peer.key.id} was lost"))

    def _become(self, link: Link, detail: str) -> None:
        changed = link is not self.link or detail != self.detail
        self.link, self.detail = link, detail
        if changed:
            self._on_change()


class _RefusedPeer(Exception):
    """The worker is not one that this router can use."""


class _StreamEnded(Exception):
    """The worker ended the stream without an error."""


def _id(attempt: AttemptId) -> worker_pb2.AttemptId:
    return worker_pb2.AttemptId(request_id=attempt.request_id, attempt=attempt.attempt)


def _words(error: grpc.aio.AioRpcError) -> str:
    return error.details() or error.code().name
