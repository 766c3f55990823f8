"""The attempts that one session carries: sorts a worker's events into their inboxes, drops and counts the stale ones.

An attempt is open from Submit until the relay abandons it. After that the worker may still speak of it until its
cancel arrives; such words are *late*: expected, dropped, counted under a kind of their own.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from baton.clock import Clock
from baton.ids import AttemptId
from baton.metrics import RouterMetrics
from baton.v1 import worker_pb2
from router.events import Arrival, DrainBegan, Ended, EndReason, Event, Inbox, Landed, Lost, Offered, Side, Tokens
from router.placement import WorkerKey

_log = logging.getLogger(__name__)
_MAX_LATE = 4096
"""Abandoned attempts that are remembered."""


@dataclass(slots=True)
class _Open:
    side: Side
    inbox: Inbox
    ended: bool = False


class SessionAttempts:
    def __init__(self, key: WorkerKey, metrics: RouterMetrics, clock: Clock) -> None:
        self._key = key
        self._metrics = metrics
        self._clock = clock
        self._open: dict[AttemptId, _Open] = {}
        self._late: OrderedDict[AttemptId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._open

    def add(self, attempt: AttemptId, side: Side, inbox: Inbox) -> None:
        assert attempt not in self._open, f"attempt {attempt} was opened twice"
        self._open[attempt] = _Open(side, inbox)

    def remove(self, attempt: AttemptId) -> bool:
        """Whether it was open."""
        entry = self._open.pop(attempt, None)
        if entry is None:
            return False
        if not entry.ended:
            self._late[attempt] = None
            if len(self._late) > _MAX_LATE:
                self._late.popitem(last=False)
        return True

    def lose_all(self, lost: Lost) -> None:
        """The session broke: each attempt hears it once, and is open no more."""
        entries = list(self._open.values())
        self._open.clear()
        self._late.clear()
        at = self._clock.now()
        for entry in entries:
            entry.inbox.force(Arrival(entry.side, at, lost))

    def drain_began(self) -> None:
        at = self._clock.now()
        for entry in self._open.values():
            if not entry.ended:
                entry.inbox.force(Arrival(entry.side, at, DrainBegan()))

    def deliver(self, events: Iterable[worker_pb2.RequestEvent]) -> None:
        at = self._clock.now()
        for message in events:
            attempt = AttemptId(message.id.request_id, message.id.attempt)
            entry = self._open.get(attempt)
            if entry is None:
                self._count_not_open(attempt, message)
                continue
            event = self._decode(message)
            if event is None or entry.ended:
                self.count_stale("malformed" if event is None else "ended")
                continue
            entry.ended = isinstance(event, Ended)
            if not entry.inbox.put(Arrival(entry.side, at, event)):
                _log.error("worker %s floods attempt %s; it is given up", self._key.id, attempt)
                entry.inbox.force(Arrival(entry.side, at, Lost(f"worker {self._key.id} sent more than was asked for")))
                entry.ended = True

    def count_stale(self, kind: str) -> None:
        self._metrics.stale_messages.labels(kind=kind).inc()

    def _count_not_open(self, attempt: AttemptId, message: worker_pb2.RequestEvent) -> None:
        if attempt not in self._late:
            self.count_stale("unknown")
            return
        self.count_stale("late")
        if message.WhichOneof("event") == "ended":
            del self._late[attempt]

    def _decode(self, message: worker_pb2.RequestEvent) -> Event | None:
        """None for what cannot be read, or is not this worker's to say."""
        match message.WhichOneof("event"):
            case "tokens":
                tokens = message.tokens
                return Tokens(tokens.index, tuple(tokens.token_ids), tokens.cached_tokens)
            case "ticket":
                ticket = message.ticket
                own = (ticket.worker_id, ticket.incarnation) == (self._key.id, self._key.incarnation)
                return Offered(ticket) if own else None
            case "landed":
                landed = message.landed
                return Landed(landed.seconds, landed.blocks, landed.bytes, landed.transport)
            case "ended":
                try:
                    return Ended(EndReason(message.ended.reason), message.ended.message)
                except ValueError:
                    return Ended(EndReason.UNAVAILABLE, f"ended for an unknown reason {message.ended.reason}")
            case _:
                return None
