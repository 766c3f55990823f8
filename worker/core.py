"""Which attempt belongs to which session, until when, and what its router has been told. Lives on the event loop.

    router ──Submit, Handoff, Cancel──► Session ► WorkerCore ► Role ──commands──► engine thread
    router ◄────── one Step a step ──── Session ◄ WorkerCore ◄ Role ◄──events───┘

Every attempt gets exactly one Ended, whatever happens to it: it ends well, is cancelled, runs into its deadline, its
session breaks, or the worker drains.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from baton.clock import Clock, MonotonicClock
from baton.errors import BatonError, InvalidRequest
from baton.ids import AttemptId, BlockHash
from baton.logs import Rarely
from baton.metrics import RequestMetrics, WorkerMetrics
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2, worker_pb2
from engine.messages import (
    AddRequest,
    BlocksEvicted,
    BlocksStored,
    Ended,
    EndReason,
    Event,
    Load,
    RequestEvent,
    Task,
    Tokens,
)
from worker.role import Role
from worker.session import Session
from worker.wire import PrefixSource, attempt_id, proto_id

log = logging.getLogger(__name__)

_TASKS = {
    worker_pb2.TASK_PREFILL: Task.PREFILL,
    worker_pb2.TASK_RECEIVE: Task.RECEIVE,
    worker_pb2.TASK_LOCAL: Task.LOCAL,
}
_END_REASONS = {
    EndReason.STOP: worker_pb2.END_REASON_STOP,
    EndReason.LENGTH: worker_pb2.END_REASON_LENGTH,
    EndReason.PREFILLED: worker_pb2.END_REASON_PREFILLED,
    EndReason.CANCELLED: worker_pb2.END_REASON_CANCELLED,
    EndReason.DEADLINE: worker_pb2.END_REASON_DEADLINE,
    EndReason.INVALID: worker_pb2.END_REASON_INVALID,
    EndReason.HANDOFF_FAILED: worker_pb2.END_REASON_HANDOFF_FAILED,
    EndReason.UNAVAILABLE: worker_pb2.END_REASON_UNAVAILABLE,
    EndReason.MOVED: worker_pb2.END_REASON_MOVED,
}
_MAX_REQUEST_ID = 256


class BlockEvents(Protocol):
    """Who wants to know which blocks can be hit."""

    def stored(self, hashes: Iterable[BlockHash]) -> None: ...

    def evicted(self, hashes: Iterable[BlockHash]) -> None: ...


@dataclass(slots=True)
class _Attempt:
    session: Session
    arrived: float
    last_token: float | None = None
    deadline: asyncio.TimerHandle | None = None
    ended: bool = False


class WorkerCore:
    def __init__(
        self,
        make_role: Callable[[WorkerCore], Role],
        *,
        vocab_size: int,
        block_events: BlockEvents | None,
        request_metrics: RequestMetrics,
        metrics: WorkerMetrics,
        clock: Clock | None = None,
    ) -> None:
        self._clock = MonotonicClock() if clock is None else clock
        self.vocab_size = vocab_size
        self._block_events = block_events
        self._request_metrics = request_metrics
        self._metrics = metrics
        self._rarely = Rarely(log, self._clock)
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._sessions: dict[Session, None] = {}  # in the order in which they were opened
        self._load = inference_pb2.Load()
        self._draining = False
        self._all_over = asyncio.Event()
        self._all_over.set()
        self._role = make_role(self)

    @property
    def open_attempts(self) -> list[AttemptId]:
        """Those that have not ended, or whose blocks another worker may still read or write."""
        return list(self._attempts)

    # --- what routers say

    def open_session(self, session: Session) -> None:
        self._sessions[session] = None
        session.put(worker_pb2.Step(load=self._load, draining=self._draining))

    def close_session(self, session: Session) -> None:
        """Its router is gone: nobody waits for its requests any more."""
        self._sessions.pop(session, None)
        for request_id in [i for i, a in self._attempts.items() if a.session is session]:
            self._role.cancel(request_id, EndReason.CANCELLED, "the router's session broke")

    def receive(self, session: Session, message: worker_pb2.SessionRequest) -> None:
        kind = message.WhichOneof("message")
        if kind == "submit":
            self._submit(session, message.submit)
        elif kind == "handoff":
            self._handoff(message.handoff)
        elif kind == "cancel":
            self._cancel(message.cancel)
        elif kind == "move":
            self._move(message.move)
        else:
            self._stale("unknown", "a message of no known kind")

    def _submit(self, session: Session, submit: worker_pb2.Submit) -> None:
        request_id = attempt_id(submit.id)
        if request_id in self._attempts:
            self._stale("submit", str(request_id))
            return
        self._attempts[request_id] = attempt = _Attempt(session, self._clock.now())
        self._all_over.clear()
        try:
            request = self._checked(request_id, submit)
        except BatonError as error:
            self.end(request_id, EndReason.INVALID, error.message)
            return
        if self._draining:
            self.end(request_id, EndReason.UNAVAILABLE, "the worker is draining")
            return
        if submit.deadline_seconds > 0:
            attempt.deadline = asyncio.get_running_loop().call_later(
                submit.deadline_seconds, self._role.cancel, request_id, EndReason.DEADLINE, "deadline exceeded"
            )
        self._request_metrics.prompt_tokens.inc(request.num_prompt_tokens)
        self._request_metrics.request_prompt_tokens.observe(request.num_prompt_tokens)
        self._role.submit(submit.task, request, _prefix_source(request_id, submit))

    def _handoff(self, handoff: worker_pb2.Handoff) -> None:
        request_id = attempt_id(handoff.id)
        attempt = self._attempts.get(request_id)
        if attempt is None or attempt.ended:
            self._stale("handoff", str(request_id))
            return
        try:
            self._role.handoff(request_id, handoff.ticket)
        except BatonError as error:
            self._stale("malformed", error.message)
            self._role.cancel(request_id, EndReason.HANDOFF_FAILED, error.message)

    def _cancel(self, cancel: worker_pb2.Cancel) -> None:
        request_id = attempt_id(cancel.id)
        if request_id not in self._attempts:
            self._stale("cancel", str(request_id))
            return
        self._role.cancel(request_id, EndReason.CANCELLED, "")

    def _move(self, move: worker_pb2.Move) -> None:
        request_id = attempt_id(move.id)
        attempt = self._attempts.get(request_id)
        if attempt is None or attempt.ended:
            self._stale("move", str(request_id))
            return
        self._role.move(request_id)

    def _stale(self, kind: str, message: str) -> None:
        """Of no use, or of none any more: it changes nothing."""
        self._metrics.stale_messages.labels(kind=kind).inc()
        self._rarely.info(f"dropped, {kind}", message)

    def _checked(self, request_id: AttemptId, submit: worker_pb2.Submit) -> AddRequest:
        """Raises InvalidRequest. The router has checked already; a worker trusts nobody with its engine."""
        if not 0 < len(request_id.request_id) <= _MAX_REQUEST_ID:
            raise InvalidRequest(
                f"request id of {len(request_id.request_id)} characters; 1 to {_MAX_REQUEST_ID} will do"
            )
        if submit.task not in self._role.tasks:
            asked = _TASKS[submit.task].value if submit.task in _TASKS else str(submit.task)
            takes = " and ".join(_TASKS[task].value for task in sorted(self._role.tasks))
            raise InvalidRequest(f"the task is {asked}; this worker takes {takes}")
        token_ids = tuple(submit.token_ids)
        if not 1 <= submit.num_prompt_tokens <= len(token_ids):
            raise InvalidRequest(f"{submit.num_prompt_tokens} prompt tokens among {len(token_ids)} tokens")
        if max(token_ids) >= self.vocab_size:
            raise InvalidRequest(f"token id {max(token_ids)} is not below the vocabulary's {self.vocab_size}")
        sampling = SamplingParams.from_proto(submit.sampling)
        sampling.check(self.vocab_size)
        if sampling.seed is None and not sampling.greedy:
            raise InvalidRequest("a sampled request needs a seed", param="seed")
        return AddRequest(
            id=request_id,
            task=_TASKS[submit.task],
            token_ids=token_ids,
            num_prompt_tokens=submit.num_prompt_tokens,
            sampling=sampling,
            cache_salt=submit.cache_salt,
        )

    # --- what the engine and the role say

    def on_engine_events(self, events: list[Event], load: Load) -> None:
        now = _load_proto(load)
        if now != self._load:
            self._load = now
            for session in self._sessions:
                session.put(worker_pb2.Step(load=now, draining=self._draining))
        for event in events:
            if isinstance(event, BlocksStored):
                if self._block_events is not None:
                    self._block_events.stored(event.hashes)
            elif isinstance(event, BlocksEvicted):
                if self._block_events is not None:
                    self._block_events.evicted(event.hashes)
            else:
                self._on_request_event(event)
        self._flush()

    def _on_request_event(self, event: RequestEvent) -> None:
        try:
            self._role.on_event(event)
        except Exception as error:  # a defect in one request's handling must not swallow the others' events
            log.exception("%s: an event could not be handled; the attempt ends", event.id)
            self._role.cancel(event.id, EndReason.UNAVAILABLE, f"the worker failed: {error}")
        if isinstance(event, Tokens):
            self._tokens(event)
        elif isinstance(event, Ended):
            self._end(event.id, event.reason, event.message)

    def tell(self, event: worker_pb2.RequestEvent) -> None:
        """Puts an event of the role's into the next Step of the attempt's session."""
        attempt = self._attempts.get(attempt_id(event.id))
        if attempt is not None and not attempt.ended:
            attempt.session.add(event)
            attempt.session.flush(self._load, self._draining)

    def end(self, request_id: AttemptId, reason: EndReason, message: str) -> None:
        """The terminal reply for an attempt that never reached the engine."""
        self._end(request_id, reason, message)
        self._flush()

    def let_go(self, request_id: AttemptId) -> None:
        """The role holds nothing for the attempt any more."""
        attempt = self._attempts.get(request_id)
        if attempt is not None and attempt.ended:
            self._forget(request_id)

    def _tokens(self, event: Tokens) -> None:
        attempt = self._attempts.get(event.id)
        if attempt is None:
            return
        now = self._clock.now()
        if attempt.last_token is None:
            self._request_metrics.time_to_first_token.observe(now - attempt.arrived)
        else:
            self._request_metrics.inter_token_latency.observe(now - attempt.last_token)
        attempt.last_token = now
        self._request_metrics.generation_tokens.inc(len(event.token_ids))
        tokens = worker_pb2.Tokens(index=event.index, token_ids=event.token_ids, cached_tokens=event.num_cached_tokens)
        attempt.session.add(worker_pb2.RequestEvent(id=proto_id(event.id), tokens=tokens))

    def _end(self, request_id: AttemptId, reason: EndReason, message: str) -> None:
        attempt = self._attempts.get(request_id)
        if attempt is None or attempt.ended:
            return
        attempt.ended = True
        if attempt.deadline is not None:
            attempt.deadline.cancel()
        ended = worker_pb2.Ended(reason=_END_REASONS[reason], message=message)
        attempt.session.add(worker_pb2.RequestEvent(id=proto_id(request_id), ended=ended))
        self._request_metrics.e2e_request_latency.observe(self._clock.now() - attempt.arrived)
        self._request_metrics.ended(reason.value)
        if not self._role.holds(request_id):
            self._forget(request_id)

    def _forget(self, request_id: AttemptId) -> None:
        del self._attempts[request_id]
        if not self._attempts:
            self._all_over.set()

    def _flush(self) -> None:
        for session in self._sessions:
            session.flush(self._load, self._draining)

    # --- the end

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, lets the open ones and what they hold end, then ends what is left: their routers
        go on with them elsewhere."""
        started = self._clock.now()
        self._draining = True
        for session in self._sessions:
            session.put(worker_pb2.Step(load=self._load, draining=True))
        log.info("draining: %d attempts open", len(self._attempts))
        try:
            await asyncio.wait_for(self._all_over.wait(), seconds)
        except TimeoutError:
            log.warning("%d attempts did not end within %.0f s of draining", len(self._attempts), seconds)
            self.end_all("the worker is shutting down")
            return
        await self._role.drain(max(0.0, started + seconds - self._clock.now()))

    def end_all(self, message: str) -> None:
        for request_id in list(self._attempts):
            self._role.cancel(request_id, EndReason.UNAVAILABLE, message)
            self._end(request_id, EndReason.UNAVAILABLE, message)
        self._flush()


def _prefix_source(request_id: AttemptId, submit: worker_pb2.Submit) -> PrefixSource | None:
    """A hint: one that can't be read is none."""
    if not submit.HasField("prefix"):
        return None
    try:
        return PrefixSource.from_proto(submit.prefix)
    except BatonError as error:
        log.warning("%s: all of its prompt is computed here: %s", request_id, error.message)
        return None


def _load_proto(load: Load) -> inference_pb2.Load:
    return inference_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        available_blocks=load.blocks.available,
        total_blocks=load.blocks.total,
        queued_tokens=load.queued_tokens,
    )
