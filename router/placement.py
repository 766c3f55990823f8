"""Which workers serve a request. Pure policy: plain data in, a frozen `Placement` out; no I/O, no clock, no gRPC.

The scorer turns every worker into a cost with named terms; the picker takes the least cost among the ways that the
rules allow. A cost is in prompt tokens: the time that computing so many of them would take.

The rules. A decode worker computes the prompt itself (LOCAL) where what it lacks is short, or no prefill worker is
there; a unified worker always does. Otherwise a prefill worker computes it and the decode worker receives it (REMOTE).
Nobody who is not ready, is excluded, or could never hold the prompt is ever picked. Those with room are preferred.
Only workers whose layouts match are paired; those that lay out blocks alike, and above all of one dtype, are preferred.

Whoever computes the prompt fetches its beginning from a worker that holds more of it, where that is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from baton.ids import Incarnation, WorkerId
from baton.layout import KVLayout, mismatch

TRANSFER_COST = 0.1
"""Moving a token's KV, measured against computing it."""
RELAYING_COST = 0.05
"""What a token's KV costs more where its blocks are re-laid on the way in."""
CONVERTING_COST = 0.5
"""And where its dtype changes: the blocks then hold other values than the decode worker would have computed, and serve
one stream alone."""
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
    layout: KVLayout
    streams: int = 0
    """Requests running and waiting there."""
    queued_tokens: int = 0
    """Prompt tokens taken on and not computed yet."""
    available_blocks: int = 0
    cached_blocks: int = 0
    """Of this request's prompt, from its beginning on: as the directory predicts."""

    @property
    def cached_tokens(self) -> int:
        return self.cached_blocks * self.layout.block_size


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
    local_prefill_tokens: int
    fetch_prefix_tokens: int = 0
    """Least that is worth fetching; 0: nothing is."""
    offered_blocks: int = 0
    """That the request brings along from a worker that it moves away from."""
    offered_layout: KVLayout | None = None
    """Of these."""
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
    sources = [c for c in usable if c.role is Role.PREFILL]
    holders = sorted(candidates, key=lambda c: (-c.cached_tokens, tie_breaker(c.key), c.key))

    def order(pair: tuple[Score, Score | None]) -> tuple[float, float, WorkerKey, float, WorkerKey]:
        decode, prefill = pair
        source = prefill or decode
        cost = decode.cost + (prefill.cost if prefill is not None else 0.0)
        return cost, tie_breaker(decode.key), decode.key, tie_breaker(source.key), source.key

    pairs = [pair for c in usable if c.role.decodes for pair in _pairs(c, sources, need, holders)]
    if not pairs:
        return None
    decode, prefill = min(pairs, key=order)
    if prefill is None:
        return Placement(Way.LOCAL, decode.key, None, need.num_tokens - decode.missing_tokens, decode, None)
    cached = need.num_tokens - prefill.missing_tokens
    return Placement(Way.REMOTE, decode.key, prefill.key, cached, decode, prefill)


def _usable(candidate: Candidate, need: Need) -> bool:
    return (
        candidate.state is State.READY
        and candidate.key not in need.excluded
        and candidate.max_prompt_len >= need.num_tokens
    )


def _pairs(
    decode: Candidate, sources: Sequence[Candidate], need: Need, holders: Sequence[Candidate]
) -> list[tuple[Score, Score | None]]:
    """The ways to serve it on `decode`: with each prefill worker whose blocks it can use, or alone."""
    matching = [source for source in sources if not mismatch(source.layout, decode.layout)]
    alone = _score_alone(decode, need, holders)
    if decode.role is Role.UNIFIED or alone.missing_tokens <= need.local_prefill_tokens or not matching:
        return [(alone, None)]
    return [(_score_receiving(decode, need, source), _score_prefill(source, need, holders)) for source in matching]


def _missing_tokens(cached_tokens: int, need: Need) -> int:
    """At least 1: the last token is always computed, for the next one is drawn from it."""
    return max(need.num_tokens - cached_tokens, 1)


def _prefix(candidate: Candidate, need: Need, holders: Sequence[Candidate]) -> Prefix | None:
    """What the candidate had better fetch than compute: blocks of its own layout, for what it computes on from them is
    cached under its own names, and may be handed on."""
    layout = candidate.layout
    if need.offered_blocks > candidate.cached_blocks and need.offered_layout == layout:
        return Prefix(None, need.offered_blocks)
    holder = next((h for h in holders if h.key != candidate.key and h.layout == layout), None)
    if holder is None or not need.fetch_prefix_tokens or holder.state is State.UNREACHABLE:
        return None
    gained = _missing_tokens(candidate.cached_tokens, need) - _missing_tokens(holder.cached_tokens, need)
    return Prefix(holder.key, holder.cached_blocks) if gained >= need.fetch_prefix_tokens else None


def _computing(candidate: Candidate, need: Need, holders: Sequence[Candidate]) -> tuple[int, Prefix | None, float]:
    """Tokens that are left to compute here, what is fetched before that, and what fetching costs."""
    prefix = _prefix(candidate, need, holders)
    alone = _missing_tokens(candidate.cached_tokens, need)
    if prefix is None:
        return alone, None, 0.0
    missing = _missing_tokens(prefix.num_blocks * candidate.layout.block_size, need)
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


def _score_alone(candidate: Candidate, need: Need, holders: Sequence[Candidate]) -> Score:
    missing, prefix, fetch = _computing(candidate, need, holders)
    terms = {"compute": float(missing), "fetch": fetch} | _waits(candidate, need)
    return Score(candidate.key, Way.LOCAL, missing, terms, prefix)


def _score_receiving(candidate: Candidate, need: Need, source: Candidate) -> Score:
    missing = _missing_tokens(candidate.cached_tokens, need)
    terms = {"transfer": missing * TRANSFER_COST} | _waits(candidate, need)
    if source.layout != candidate.layout:
        terms["relaying"] = missing * RELAYING_COST
        terms["converting"] = missing * CONVERTING_COST * (source.layout.dtype != candidate.layout.dtype)
    return Score(candidate.key, Way.REMOTE, missing, terms)


def _waits(candidate: Candidate, need: Need) -> dict[str, float]:
    """Of a worker that decodes, however the prompt comes."""
    return {
        "queued": float(candidate.queued_tokens),
        "streams": STREAM_COST * candidate.streams,
        "room": _room_term(candidate, need, growth=1),
    }


def _room_term(candidate: Candidate, need: Need, growth: int = 0) -> float:
    """Fetched, received or computed, what is not cached takes blocks."""
    blocks = growth - (-_missing_tokens(candidate.cached_tokens, need) // candidate.layout.block_size)
    return NO_ROOM_COST if blocks > candidate.available_blocks else 0.0
