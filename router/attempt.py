"""One try at a request on the workers it was placed on: submits, forwards the ticket, cancels. Decides nothing.

Opened at once on both workers; closed exactly once, whatever happened. Closing tells every worker that may still hold
something of it to give it up.
"""

from __future__ import annotations

import asyncio

from baton.clock import Clock
from baton.errors import Unavailable, WorkerLost
from baton.ids import AttemptId
from baton.v1 import transfer_pb2, worker_pb2
from router.events import Arrival, DeadlinePassed, Inbox, Offered, Side
from router.merge import TokenLog
from router.placement import Placement, Way, WorkerKey
from router.prepare import PreparedRequest
from router.session import WorkerSession
from router.verdict import AttemptState, Retry, Verdict
from router.workers import Workers

_LOCAL = ((Side.DECODE, worker_pb2.TASK_LOCAL),)
_REMOTE = ((Side.DECODE, worker_pb2.TASK_RECEIVE), (Side.PREFILL, worker_pb2.TASK_PREFILL))
_SPARE_EVENTS = 64
"""Arrivals beyond two for each token that may wait unread: tickets, landings, ends."""


class Attempt:
    """`open` it, `take` what arrives until there is a verdict, `close` it."""

    def __init__(
        self,
        request: PreparedRequest,
        number: int,
        placement: Placement,
        log: TokenLog,
        moved: transfer_pb2.Ticket | None = None,
    ) -> None:
        """`moved`: what the worker offered that the request moves away from."""
        self.id = AttemptId(request.name, number)
        self.placement = placement
        self.state = AttemptState(log, remote=placement.way is Way.REMOTE)
        self.opened_at = 0.0
        self._request = request
        self._moved = moved
        self._is_moving = False
        self._inbox = Inbox(limit=2 * request.max_tokens + _SPARE_EVENTS)
        self._sessions: dict[Side, WorkerSession] = {}
        self._deadline: asyncio.TimerHandle | None = None

    def worker(self, side: Side) -> WorkerKey:
        """The worker of that side; the decode worker also where there is no prefill worker."""
        prefill = self.placement.prefill if side is Side.PREFILL else None
        return prefill or self.placement.decode

    def open(self, workers: Workers, tokens: list[int], clock: Clock, deadline: float) -> Retry | None:
        """The verdict where a worker does not take it. `tokens`: prompt and answer so far. `deadline`: by `clock`."""
        self.opened_at = clock.now()
        remaining = max(deadline - self.opened_at, 0.001)
        for side, task in _LOCAL if self.placement.prefill is None else _REMOTE:
            try:
                self._submit(workers, side, task, tokens, remaining)
            except Unavailable as error:
                return Retry(side, error.message)
        loop = asyncio.get_running_loop()
        passed = Arrival(Side.DECODE, deadline, DeadlinePassed())
        self._deadline = loop.call_later(remaining, self._inbox.force, passed)
        return None

    def _submit(
        self, workers: Workers, side: Side, task: worker_pb2.Task.ValueType, tokens: list[int], remaining: float
    ) -> None:
        key = self.worker(side)
        session = workers.session(key)
        if session is None:
            raise WorkerLost(f"worker {key.id} is gone")
        submit = worker_pb2.Submit(
            id=worker_pb2.AttemptId(request_id=self.id.request_id, attempt=self.id.attempt),
            task=task,
            token_ids=tokens,
            num_prompt_tokens=len(self._request.prompt_ids),
            sampling=self._request.sampling.to_proto(),
            cache_salt=self._request.cache_salt,
            deadline_seconds=remaining,
        )
        if task != worker_pb2.TASK_RECEIVE:
            self._add_prefix(workers, submit)
        session.open(submit, side, self._inbox)
        self._sessions[side] = session

    def _add_prefix(self, workers: Workers, submit: worker_pb2.Submit) -> None:
        prefix = self.placement.prefix
        if prefix is None:
            return
        holder = None if prefix.holder is None else workers.session(prefix.holder)
        if self._moved is not None and prefix.holder is None:
            submit.prefix.ticket.CopyFrom(self._moved)
        elif holder is not None:
            submit.prefix.worker_id, submit.prefix.incarnation = holder.peer.key
            submit.prefix.address = holder.peer.address
            submit.prefix.num_blocks = prefix.num_blocks

    def move(self) -> None:
        """Asks the decode worker, which drains, to let the stream go on elsewhere; the verdict says when it does."""
        if not self._is_moving:
            self._is_moving = True
            self._sessions[Side.DECODE].move(self.id)

    async def take(self) -> tuple[list[Arrival], Verdict | None]:
        """Waits for something to arrive and lets the state read it; nothing is read behind a verdict."""
        read: list[Arrival] = []
        for arrival in await self._inbox.take():
            if isinstance(arrival.event, Offered) and arrival.side is Side.PREFILL:
                self._sessions[Side.DECODE].handoff(self.id, arrival.event.ticket)
            verdict = self.state.take(arrival)
            read.append(arrival)
            if verdict is not None:
                return read, verdict
        return read, None

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for side, session in self._sessions.items():
            cancel = self.state.cancel_prefill if side is Side.PREFILL else self.state.cancel_decode
            session.abandon(self.id, cancel=cancel)
        self._sessions.clear()
