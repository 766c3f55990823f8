"""What workers say about one attempt, as the relay reads it, and the inbox in which it waits.

A session decodes a worker's messages into these and puts them into the attempt's inbox; nobody else does. Both workers
of an attempt speak into one inbox, so their order of arrival is kept.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum

from baton.v1 import transfer_pb2


class Side(Enum):
    """Which of an attempt's two workers."""

    PREFILL = "prefill"
    DECODE = "decode"


class EndReason(Enum):
    """baton.v1.EndReason, by number."""

    STOP = 1
    LENGTH = 2
    PREFILLED = 3
    CANCELLED = 4
    DEADLINE = 5
    INVALID = 6
    HANDOFF_FAILED = 7
    UNAVAILABLE = 8
    MOVED = 9


@dataclass(frozen=True, slots=True)
class Offered:
    """The prefill worker took the prompt on; `ticket` names the blocks that will hold it. Or the decode worker lets
    the stream go on elsewhere, and offers what it has computed."""

    ticket: transfer_pb2.Ticket


@dataclass(frozen=True, slots=True)
class Tokens:
    index: int
    """How many tokens had been generated before these, over all attempts."""
    token_ids: tuple[int, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Landed:
    seconds: float
    blocks: int
    bytes: int
    transport: str


@dataclass(frozen=True, slots=True)
class Ended:
    reason: EndReason
    message: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The session to the worker broke: nothing more will come from it."""

    message: str


@dataclass(frozen=True, slots=True)
class DrainBegan:
    """The worker takes no more requests and soon is gone."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """Not a worker's: the request's own clock says so."""


Event = Offered | Tokens | Landed | Ended | Lost | DrainBegan | DeadlinePassed


@dataclass(frozen=True, slots=True)
class Arrival:
    side: Side
    at: float
    """When it reached the router, by the router's clock, in seconds."""
    event: Event


class Inbox:
    """One attempt's. Single reader. A worker that says more than `limit` things unread is cut off: see `put`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._arrivals: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, arrival: Arrival) -> bool:
        """False when the inbox is full; the arrival is dropped then, and the attempt is beyond saving."""
        if len(self._arrivals) >= self._limit:
            return False
        self.force(arrival)
        return True

    def force(self, arrival: Arrival) -> None:
        """Like `put`, without the limit: for the few arrivals that the router makes itself."""
        self._arrivals.append(arrival)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Arrival]:
        """All that has arrived, in its order; waits until there is something."""
        while not self._arrivals:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._arrivals = self._arrivals, []
        return taken
