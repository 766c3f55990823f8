"""The two lifetimes of a block set, as tables. Pure: no I/O, no clock, no torch, no grpc.

A source set is what a prefill worker offers; a destination set is what a decode worker reserved for it. A row lists
the states that may follow. A state without successors is terminal and is entered once. What an abort does is in the
table too: it marks, and whether the blocks may be used again is asked of the gate (kvtransfer/gate.py), not of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

from baton.errors import InternalError


class SourceState(Enum):
    OFFERED = "offered"
    """A ticket names the blocks; nobody has come for them."""
    CLAIMED = "claimed"
    """One puller reads them and renews its lease."""
    RELEASED = "released"
    """The puller is done with them."""
    EXPIRED = "expired"
    """Nobody claimed, or the claimant stopped renewing."""
    ABORTED = "aborted"
    """The source gave the request up."""


class DestinationState(Enum):
    RESERVED = "reserved"
    """The blocks are kept free for what will land in them; nobody writes."""
    LANDING = "landing"
    """The set is claimed, and bytes are on their way into the blocks."""
    VERIFYING = "verifying"
    """All has landed and no writer is left."""
    COMMITTED = "committed"
    """The blocks may be read."""
    QUARANTINED = "quarantined"
    """Given up, and a writer may still reach the blocks."""
    FREE = "free"
    """Given up, and nobody can write any more."""


SOURCE: Mapping[SourceState, frozenset[SourceState]] = {
    SourceState.OFFERED: frozenset({SourceState.CLAIMED, SourceState.EXPIRED, SourceState.ABORTED}),
    SourceState.CLAIMED: frozenset({SourceState.RELEASED, SourceState.EXPIRED, SourceState.ABORTED}),
    SourceState.RELEASED: frozenset(),
    SourceState.EXPIRED: frozenset(),
    SourceState.ABORTED: frozenset(),
}

# LANDING and VERIFYING go to FREE only where no writer is in flight, to QUARANTINED otherwise. RESERVED has none.
DESTINATION: Mapping[DestinationState, frozenset[DestinationState]] = {
    DestinationState.RESERVED: frozenset({DestinationState.LANDING, DestinationState.FREE}),
    DestinationState.LANDING: frozenset(
        {DestinationState.VERIFYING, DestinationState.QUARANTINED, DestinationState.FREE}
    ),
    DestinationState.VERIFYING: frozenset({DestinationState.COMMITTED, DestinationState.FREE}),
    DestinationState.COMMITTED: frozenset(),
    DestinationState.QUARANTINED: frozenset({DestinationState.FREE}),
    DestinationState.FREE: frozenset(),
}

LIVE = frozenset(
    {state.value for state, following in SOURCE.items() if following}
    | {state.value for state, following in DESTINATION.items() if following}
)
"""Names of all states that are not terminal."""

S = TypeVar("S", bound=Enum)


class Lifetime(Generic[S]):
    """Where one set is in its table. `changed(old, new)` is called after every step; at birth `old` is None."""

    def __init__(
        self,
        table: Mapping[S, frozenset[S]],
        initial: S,
        changed: Callable[[S | None, S], None] | None = None,
    ) -> None:
        self._table = table
        self._state = initial
        self._changed = changed
        if changed is not None:
            changed(None, initial)

    @property
    def state(self) -> S:
        return self._state

    @property
    def terminal(self) -> bool:
        return not self._table[self._state]

    def to(self, state: S) -> None:
        """Raises InternalError where the table has no such step; then nothing has changed."""
        old = self._state
        if state not in self._table[old]:
            allowed = ", ".join(sorted(s.name for s in self._table[old])) or "nothing: it is terminal"
            raise InternalError(f"a block set cannot go from {old.name} to {state.name}; it can go to {allowed}")
        self._state = state
        if self._changed is not None:
            self._changed(old, state)
