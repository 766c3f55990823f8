"""A worker without an engine: a real gRPC server that speaks Worker.Session and draws tokens from a formula.

The next token is a function of the seed and all tokens before it, so whoever skips, repeats or alters one token gets
another answer. Scripts make it stall, die, fail handoffs, and say things that it should not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import grpc

from baton.ids import Incarnation, WorkerId, new_incarnation, new_transfer_id
from baton.layout import KVLayout
from baton.v1 import inference_pb2, transfer_pb2, worker_pb2, worker_pb2_grpc
from discovery import WorkerRecord, WorkerRole

EOS = 256
VOCAB = 257
BLOCK_SIZE = 4
LAYOUT = KVLayout(2, 2, BLOCK_SIZE, 8, "float32", b"weights")
MODEL = worker_pb2.ModelInfo(
    name="tiny",
    max_model_len=512,
    block_size=BLOCK_SIZE,
    vocab_size=VOCAB,
    max_prompt_len=400,
    model_fingerprint=LAYOUT.model_fingerprint,
    layout_fingerprint=LAYOUT.fingerprint,
    layout=LAYOUT.to_proto(),
    source="tests",
    eos_token_ids=[EOS],
)


def model(**changes: object) -> worker_pb2.ModelInfo:
    """Of a worker whose layout differs in `changes`."""
    layout = replace(LAYOUT, **changes)  # type: ignore[arg-type]  # each value is its field's
    other = worker_pb2.ModelInfo()
    other.CopyFrom(MODEL)
    other.block_size, other.model_fingerprint = layout.block_size, layout.model_fingerprint
    other.layout_fingerprint = layout.fingerprint
    other.layout.CopyFrom(layout.to_proto())
    return other


_ROLES = {
    WorkerRole.PREFILL: inference_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: inference_pb2.WORKER_ROLE_DECODE,
    WorkerRole.UNIFIED: inference_pb2.WORKER_ROLE_UNIFIED,
}


def next_token(seed: int, token_ids: Sequence[int]) -> int:
    """A lower-case letter, as a byte."""
    digest = blake2b(bytes(t % 256 for t in token_ids), key=seed.to_bytes(8, "little"), digest_size=2).digest()
    return ord("a") + int.from_bytes(digest, "little") % 26


def expected_tokens(prompt: Sequence[int], count: int, seed: int = 0) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(seed, tokens))
    return tuple(tokens[len(prompt) :])


_SOURCES: dict[bytes, asyncio.Event] = {}
"""By transfer id: set once the source has computed all. Stands for the blocks, which fakes do not have."""

Hook = Callable[["FakeWorker", worker_pb2.Submit, int], Awaitable[None]]
"""Awaited before token `index` is reported."""


@dataclass
class FakeWorker:
    id: str
    role: WorkerRole
    model: worker_pb2.ModelInfo = field(default_factory=lambda: MODEL)
    incarnation: int = field(default_factory=new_incarnation)
    before_token: Hook | None = None
    eos_at: int | None = None
    """Answers end by EOS as their token of this index."""
    cached_tokens: int = 0
    failing_handoffs: int = 0
    endings: list[tuple[int, str]] = field(default_factory=list)
    """Reasons and messages with which the next submits are ended at once."""
    noisy: bool = False
    """Repeats every event, and speaks of attempts that nobody made."""
    before_handoff: asyncio.Event | None = None
    """What a receiving decode worker waits for."""
    before_end: Callable[[FakeWorker], Awaitable[None]] | None = None
    ticket_incarnation: int = 0
    """What its tickets say in place of its own."""
    say_prefilled: bool = False
    """A prefill worker that goes past EOS."""
    ticket_seconds: float = 0.0
    """How long a prefill worker lets a prompt wait before it takes it on."""
    deaf: bool = False
    """Does nothing when it is asked to let a stream go."""
    overrun: bool = False
    """Goes on past max_tokens."""
    load: inference_pb2.Load = field(
        default_factory=lambda: inference_pb2.Load(available_blocks=1000, total_blocks=1000)
    )

    def __post_init__(self) -> None:
        self.submits: list[worker_pb2.Submit] = []
        self.cancels: list[tuple[str, int]] = []
        self.handoffs: list[worker_pb2.Handoff] = []
        self.moves: list[tuple[str, int]] = []
        self.sessions = 0
        self.draining = False
        self.address = ""
        self._changed = asyncio.Event()
        self._outs: list[asyncio.Queue[worker_pb2.SessionResponse | grpc.StatusCode]] = []
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def record(self) -> WorkerRecord:
        return WorkerRecord(
            id=WorkerId(self.id),
            incarnation=Incarnation(self.incarnation),
            role=self.role,
            address=self.address,
            metrics="127.0.0.1:9",
            pid=42,
            model=self.model.name,
            block_size=self.model.block_size,
            model_fingerprint=self.model.model_fingerprint,
        )

    async def start(self, port: int = 0) -> FakeWorker:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServicer_to_server(_Servicer(self), self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()
        return self

    async def kill(self) -> None:
        """Breaks every session at once."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def end_sessions(self, status: grpc.StatusCode) -> None:
        for out in self._outs:
            out.put_nowait(status)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                changed = self._changed
                await changed.wait()

    def noticed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def say(self, *events: worker_pb2.RequestEvent) -> None:
        step = worker_pb2.Step(events=events, load=self.load, draining=self.draining)
        for out in self._outs:
            out.put_nowait(worker_pb2.SessionResponse(step=step))

    # --- a session

    async def session(
        self, requests: AsyncIterator[worker_pb2.SessionRequest]
    ) -> AsyncIterator[worker_pb2.SessionResponse | grpc.StatusCode]:
        """A status ends it."""
        out: asyncio.Queue[worker_pb2.SessionResponse | grpc.StatusCode] = asyncio.Queue()
        self._outs.append(out)
        self.sessions += 1
        running: dict[tuple[str, int], asyncio.Task[None]] = {}
        handed: dict[tuple[str, int], asyncio.Future[bytes]] = {}
        reader = asyncio.create_task(self._read(requests, running, handed))
        yield worker_pb2.SessionResponse(
            hello=worker_pb2.Hello(
                worker_id=self.id,
                incarnation=self.incarnation,
                role=_ROLES[self.role],
                model=self.model,
                pid=42,
            )
        )
        self.say()
        self.noticed()
        try:
            while True:
                yield await out.get()
        finally:
            self._outs.remove(out)
            for task in [reader, *running.values()]:
                task.cancel()
            self.noticed()

    async def _read(
        self,
        requests: AsyncIterator[worker_pb2.SessionRequest],
        running: dict[tuple[str, int], asyncio.Task[None]],
        handed: dict[tuple[str, int], asyncio.Future[bytes]],
    ) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            message = getattr(request, kind)
            key = (message.id.request_id, message.id.attempt)
            if kind == "submit":
                self.submits.append(message)
                handed[key] = asyncio.get_running_loop().create_future()
                running[key] = asyncio.create_task(self._serve(message, handed[key]))
                self._tasks.add(running[key])
                running[key].add_done_callback(self._tasks.discard)
            elif kind == "handoff":
                self.handoffs.append(message)
                handed[key].set_result(message.ticket.transfer_id)
            elif kind == "move" and self.deaf:
                pass
            elif kind == "move":
                self.moves.append(key)
                task = running.get(key)
                if task is not None and not task.done():
                    task.cancel()
                    self.emit(message.id, ticket=self._ticket(message.id))
                    self.emit(message.id, ended=worker_pb2.Ended(reason=worker_pb2.END_REASON_MOVED))
            else:
                self.cancels.append(key)
                task = running.get(key)
                if task is not None and not task.done():
                    task.cancel()
                    self.emit(message.id, ended=worker_pb2.Ended(reason=worker_pb2.END_REASON_CANCELLED))
            self.noticed()

    async def _serve(self, submit: worker_pb2.Submit, handed: asyncio.Future[bytes]) -> None:
        if self.endings:
            reason, message = self.endings.pop(0)
            await self._end(submit.id, reason, message)
            return
        if submit.task == worker_pb2.TASK_RECEIVE:
            source = await handed
            if self.failing_handoffs:
                self.failing_handoffs -= 1
                await self._end(submit.id, worker_pb2.END_REASON_HANDOFF_FAILED, "checksum differs")
                return
            await _SOURCES[source].wait()
            if self.before_handoff is not None:
                await self.before_handoff.wait()
            landed = worker_pb2.Landed(seconds=0.5, blocks=3, bytes=300, transport="tcp")
            self.emit(submit.id, landed=landed)
        elif submit.task == worker_pb2.TASK_PREFILL:
            await asyncio.sleep(self.ticket_seconds)
            ticket = self._ticket(submit.id)
            _SOURCES[ticket.transfer_id] = asyncio.Event()
            self.emit(submit.id, ticket=ticket)
            await self._generate(submit)
            _SOURCES[ticket.transfer_id].set()
            return
        await self._generate(submit)

    async def _generate(self, submit: worker_pb2.Submit) -> None:
        tokens = list(submit.token_ids)
        last = submit.sampling.max_tokens + self.overrun
        if submit.task == worker_pb2.TASK_PREFILL:
            last = len(tokens) - submit.num_prompt_tokens + 1
        for index in range(len(tokens) - submit.num_prompt_tokens, last):
            if self.before_token is not None:
                await self.before_token(self, submit, index)
            token = EOS if index == self.eos_at else next_token(submit.sampling.seed, tokens)
            tokens.append(token)
            said = worker_pb2.Tokens(index=index, token_ids=[token], cached_tokens=self.cached_tokens)
            self.emit(submit.id, tokens=said)
            if token == EOS and not submit.sampling.ignore_eos:
                return await self._end(submit.id, worker_pb2.END_REASON_STOP)
            await asyncio.sleep(0)
        if last == submit.sampling.max_tokens:
            return await self._end(submit.id, worker_pb2.END_REASON_LENGTH)
        return await self._end(submit.id, worker_pb2.END_REASON_PREFILLED)

    def _ticket(self, attempt: worker_pb2.AttemptId) -> transfer_pb2.Ticket:
        return transfer_pb2.Ticket(
            transfer_id=new_transfer_id(),
            worker_id=self.id,
            incarnation=self.ticket_incarnation or self.incarnation,
            request_id=attempt.request_id,
            attempt=attempt.attempt,
            blocks=[transfer_pb2.TicketBlock(index=1, generation=1)],
            layout_fingerprint=self.model.layout_fingerprint,
            layout=self.model.layout,
        )

    async def _end(self, attempt: worker_pb2.AttemptId, reason: int, message: str = "") -> None:
        if self.before_end is not None:
            await self.before_end(self)
        self.emit(attempt, ended=worker_pb2.Ended(reason=reason, message=message))

    def emit(self, attempt: worker_pb2.AttemptId, **event: object) -> None:
        said = worker_pb2.RequestEvent(id=attempt, **event)
        if not self.noisy:
            self.say(said)
            return
        older = worker_pb2.AttemptId(request_id=attempt.request_id, attempt=attempt.attempt - 1)
        wrong = worker_pb2.Tokens(index=0, token_ids=[1])
        stranger = worker_pb2.AttemptId(request_id="nobody's", attempt=1)
        self.say(
            worker_pb2.RequestEvent(id=older, tokens=wrong),
            said,
            said,
            worker_pb2.RequestEvent(id=stranger, tokens=wrong),
            worker_pb2.RequestEvent(id=attempt),
        )


class _Servicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Session(self, request_iterator, context):  # type: ignore[no-untyped-def,override]  # gRPC's stub is sync
        async for response in self._worker.session(request_iterator):
            if response is grpc.StatusCode.OK:
                return
            if isinstance(response, grpc.StatusCode):
                await context.abort(response, "as the test asked for")
            yield response
