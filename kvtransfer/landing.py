"""One landing: the destination's side of a block set, from the reservation until its blocks may be used.

Owned by the event loop. It decides when blocks may be read (COMMITTED) and when given-up ones may be used again (FREE):
never while a writer of ours may still reach them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import BatonError, RequestCancelled, VerifyFailed
from baton.ids import AttemptId
from kvtransfer.gate import Gate
from kvtransfer.lifetimes import DESTINATION, DestinationState, Lifetime

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Landed:
    """What a good landing brought."""

    first_token: int | None
    """The token that the source sampled behind the prompt; None for blocks that were cached."""
    blocks: int
    """That moved; blocks that were here already are not counted."""
    bytes: int
    seconds: float
    """From the claim to the commit."""
    transport: str
    """Empty where no block had to move."""
    own_dtype: bool
    """Whether the source computes in this worker's dtype. In another it gets other values than this worker would have,
    rounded on the way or not."""


class Landing:
    """What the caller holds.

    Await `done`. If it raises, look at `in_flight`: True means that the blocks are quarantined, and `drained` returns
    when they may be used again; False means that they may be used at once.
    """

    def __init__(self, id: AttemptId, changed: Callable[[DestinationState | None, DestinationState], None]) -> None:
        """For Puller alone."""
        self.id = id
        self.gate = Gate()
        self.arrived = 0
        """Blocks that have come and are verified, so far."""
        self._lifetime = Lifetime(DESTINATION, DestinationState.RESERVED, changed)
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[Landed] = self._loop.create_future()
        self._drained = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> DestinationState:
        return self._lifetime.state

    @property
    def in_flight(self) -> bool:
        """Given up, and a writer may still reach the blocks."""
        return self.state is DestinationState.QUARANTINED

    async def done(self) -> Landed:
        """Returns once the blocks are COMMITTED. Raises a HandoffFailed that says why they will not be, or
        RequestCancelled after `cancel`. May be awaited often; cancelling the wait does not cancel the landing."""
        return await asyncio.shield(self._done)

    async def drained(self) -> None:
        """Returns once no writer can reach the blocks any more: they are COMMITTED or FREE. Transports' timeouts see
        to it that this comes."""
        await self._drained.wait()

    def cancel(self, why: str = "the landing was cancelled") -> None:
        """Gives the landing up, at once: `state` and `in_flight` are right when this returns. Does nothing if done."""
        if self.fail(RequestCancelled(why)) and self._task is not None:
            self._task.cancel()

    # --- for the pull

    def run(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def land(self) -> None:
        """Bytes may come from now on; a landing of several pulls hears it from each."""
        if self.state is not DestinationState.LANDING:
            self._lifetime.to(DestinationState.LANDING)

    def verify(self) -> bool:
        """No more bytes may come. False where a writer is still about: then the set is given up."""
        if self.gate.close(self._hop):
            self._lifetime.to(DestinationState.VERIFYING)
            return True
        self.fail(VerifyFailed("a writer is left although every block has landed"))
        return False

    def commit(self, landed: Landed) -> None:
        self._lifetime.to(DestinationState.COMMITTED)
        self._drained.set()
        self._done.set_result(landed)

    def fail(self, error: BatonError) -> bool:
        """Gives the landing up for `error`. False where it was done already, and stays as it is."""
        if self._done.done():
            return False
        # VERIFYING was entered with the gate closed and nobody inside.
        if self.state is DestinationState.VERIFYING or (not self.gate.closed and self.gate.close(self._hop)):
            self._free()
        else:
            self._lifetime.to(DestinationState.QUARANTINED)
        self._done.set_exception(error)
        self._done.exception()  # whoever does not ask is not to be warned about
        return True

    def _hop(self) -> None:
        """On the last writer's thread."""
        try:
            self._loop.call_soon_threadsafe(self._free)
        except RuntimeError:  # the loop is closed: the process ends, and its blocks with it
            log.debug("%s: its last writer outlived the event loop", self.id)

    def _free(self) -> None:
        self._lifetime.to(DestinationState.FREE)
        self._drained.set()
