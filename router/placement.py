"""Which workers serve a request. Pure policy: plain data in, a frozen `Placement` out; no I/O, no clock, no gRPC.

The scorer turns every worker into a cost with named terms; the picker takes the least cost among the ways that the
rules allow. A cost is in prompt tokens: the time that computing so many of them would take.

The rules. A decode worker computes the prompt itself (LOCAL) where what it lacks is short, or no prefill worker is
there; a unified worker always does. Otherwise a prefill worker computes it and the decode worker receives it (REMOTE).
Nobody who is not ready, is excluded, or could never hold the prompt is ever picked. Those with room are preferred.

Whoever computes the prompt fetches its beginning from a worker that holds more of it, where that is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from baton.ids import Incarnation, WorkerId

TRANSFER_COST = 0.1
"""Moving a token's KV, measured against computing it."""
STREAM_COST = 16.0
"""What a running or waiting request adds to the time of those beside it."""
NO_ROOM_COST = 1e6
"""For a worker whose blocks do not suffice now: it would have to preempt, or let the request wait."""


class WorkerKey(NamedTuple):
    """One life of one worker."""

    id: WorkerId
    incarnation: Incarnation


class Role(Enum):
    """baton.v1.WorkerRole, by number."""

    PREFILL = 1
    DECODE = 2
    UNIFIED = 3

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class State(Enum):
    """baton.v1.WorkerState, by number."""

    READY = 1
    DRAINING = 2
    UNREACHABLE = 3


class Way(Enum):
    LOCAL = "local"
    """One worker computes the prompt and decodes."""
    REMOTE = "remote"
    """One computes the prompt, another receives its blocks and decodes."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker at one moment."""

    key: WorkerKey
    role: Role
    state: State
    max_prompt_len: int
    """Most tokens of a prompt that its pool can ever hold."""
    streams: int = 0
    """Requests running and waiting there."""
    queued_tokens: int = 0
    """Prompt tokens taken on and not computed yet."""
    available_blocks: int = 0
    cached_blocks: int = 0
    """Of this request's prompt, from its beginning on: as the directory predicts."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first blocks of a request, where somebody else than the one who needs them has them."""

    holder: WorkerKey | None
    """None: they were offered already, by a worker that the request moves away from."""
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be placed."""

    num_tokens: int
    """The prompt, and what earlier attempts generated."""
    block_size: int
    local_prefill_tokens: int
    fetch_prefix_tokens: int = 0
    """Least that is worth fetching; 0: nothing is."""
    offered_blocks: int = 0
    """That the request brings along from a worker that it moves away from."""
    excluded: frozenset[WorkerKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Score:
    """Why a worker was, or was not, picked. `cost` is the sum of `terms`, in prompt tokens."""

    key: WorkerKey
    way: Way
    missing_tokens: int
    """Of the prompt, to be computed, or to be received."""
    terms: Mapping[str, float] = field(hash=False)
    prefix: Prefix | None = None
    """What is to be fetched before the rest is computed."""

    @property
    def cost(self) -> float:
        return sum(self.terms.values())

    def __str__(self) -> str:
        terms = " ".join(f"{name}={value:g}" for name, value in self.terms.items() if value)
        return f"{self.key.id}[{self.cost:g}: {terms or 'idle'}]"


@dataclass(frozen=True, slots=True)
class Placement:
    way: Way
    decode: WorkerKey
    prefill: WorkerKey | None
    """None where the decode worker computes the prompt."""
    cached_tokens: int
    """Of the prompt: predicted to be found where it is computed."""
    decode_score: Score
    prefill_score: Score | None

    @property
    def prefix(self) -> Prefix | None:
        """For the worker that computes the prompt."""
        return (self.prefill_score or self.decode_score).prefix

    def __str__(self) -> str:
        if self.prefill_score is None:
            return f"local on {self.decode_score}"
        return f"prefill on {self.prefill_score}, decode on {self.decode_score}"


TieBreaker = Callable[[WorkerKey], float]
"""Orders workers of equal cost; the least goes first."""


def place(candidates: Sequence[Candidate], need: Need, tie_breaker: TieBreaker = lambda key: 0.0) -> Placement | None:
    """Deterministic for a given tie-breaker. None: there is nobody now who could serve it."""
    usable = [c for c in candidates if _usable(c, need)]
    holders = sorted(candidates, key=lambda c: (-c.cached_blocks, tie_breaker(c.key), c.key))[:2]

    def order(score: Score) -> tuple[float, float, WorkerKey]:
        return score.cost, tie_breaker(score.key), score.key

    prefill = min((_score_prefill(c, need, holders) for c in usable if c.role is Role.PREFILL), key=order, default=None)
    options = [_score_decode(c, need, holders, prefill is not None) for c in usable if c.role.decodes]
    if not options:
        return None

    def whole_order(score: Score) -> tuple[float, float, WorkerKey]:
        remote = prefill.cost if prefill is not None and score.way is Way.REMOTE else 0.0
        return score.cost + remote, tie_breaker(score.key), score.key

    decode = min(options, key=whole_order)
    if decode.way is Way.LOCAL or prefill is None:
        return Placement(Way.LOCAL, decode.key, None, need.num_tokens - decode.missing_tokens, decode, None)
    cached = need.num_tokens - prefill.missing_tokens
    return Placement(Way.REMOTE, decode.key, prefill.key, cached, decode, prefill)


def _usable(candidate: Candidate, need: Need) -> bool:
    return (
        candidate.state is State.READY
        and candidate.key not in need.excluded
        and candidate.max_prompt_len >= need.num_tokens
    )


def _missing_tokens(cached_blocks: int, need: Need) -> int:
    """At least 1: the last token is always computed, for the next one is drawn from it."""
    return max(need.num_tokens - cached_blocks * need.block_size, 1)


def _prefix(candidate: Candidate, need: Need, holders: Sequence[Candidate]) -> Prefix | None:
    """What the candidate had better fetch than compute."""
    if need.offered_blocks > candidate.cached_blocks:
        return Prefix(None, need.offered_blocks)
    holder = next((h for h in holders if h.key != candidate.key), None)
    if holder is None or not need.fetch_prefix_tokens or holder.state is State.UNREACHABLE:
        return None
    gained = _missing_tokens(candidate.cached_blocks, need) - _missing_tokens(holder.cached_blocks, need)
    return Prefix(holder.key, holder.cached_blocks) if gained >= need.fetch_prefix_tokens else None


def _computing(candidate: Candidate, need: Need, holders: Sequence[Candidate]) -> tuple[int, Prefix | None, float]:
    """Tokens that are left to compute here, what is fetched before that, and what fetching costs."""
    prefix = _prefix(candidate, need, holders)
    alone = _missing_tokens(candidate.cached_blocks, need)
    if prefix is None:
        return alone, None, 0.0
    missing = _missing_tokens(prefix.num_blocks, need)
    return missing, prefix, TRANSFER_COST * (alone - missing)


def _score_prefill(candidate: Candidate, need: Need, holders: Sequence[Candidate]) -> Score:
    missing, prefix, fetch = _computing(candidate, need, holders)
    terms = {
        "compute": float(missing),
        "fetch": fetch,
        "queued": float(candidate.queued_tokens),
        "room": _room_term(candidate, need),
    }
    return Score(candidate.key, Way.REMOTE, missing, terms, prefix)


def _score_decode(
    candidate: Candidate, need: Need, holders: Sequence[Candidate], can_prefill_elsewhere: bool
) -> Score:  # fmt: skip
    missing, prefix, fetch = _computing(candidate, need, holders)
    waits = {
        "queued": float(candidate.queued_tokens),
        "streams": STREAM_COST * candidate.streams,
        "room": _room_term(candidate, need, growth=1),
    }
    if candidate.role is Role.UNIFIED or missing <= need.local_prefill_tokens or not can_prefill_elsewhere:
        return Score(candidate.key, Way.LOCAL, missing, {"compute": float(missing), "fetch": fetch} | waits, prefix)
    received = _missing_tokens(candidate.cached_blocks, need)
    return Score(candidate.key, Way.REMOTE, received, {"transfer": TRANSFER_COST * received} | waits)


def _room_term(candidate: Candidate, need: Need, growth: int = 0) -> float:
    """Fetched or computed, what is not cached takes blocks."""
    blocks = growth - (-_missing_tokens(candidate.cached_blocks, need) // need.block_size)
    return NO_ROOM_COST if blocks > candidate.available_blocks else 0.0
