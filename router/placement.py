"""Which workers serve a request. Pure policy: plain data in, a frozen `Placement` out; no I/O, no clock, no gRPC.

The scorer turns every worker into a cost with named terms; the picker takes the least cost among the ways that the
rules allow. A cost is in prompt tokens: the time that computing so many of them would take.

The rules. A decode worker computes the prompt itself (LOCAL) where what it lacks is short, or no prefill worker is
there; a unified worker always does. Otherwise a prefill worker computes it and the decode worker receives it (REMOTE).
Nobody who is not ready, is excluded, or could never hold the prompt is ever picked. Those with room are preferred.
Only workers whose layouts match are paired; those that lay out blocks alike, and above all of one dtype, are preferred.
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


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be placed."""

    num_tokens: int
    """The prompt, and what earlier attempts generated."""
    local_prefill_tokens: int
    excluded: frozenset[WorkerKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Score:
    """Why a worker was, or was not, picked. `cost` is the sum of `terms`, in prompt tokens."""

    key: WorkerKey
    way: Way
    missing_tokens: int
    terms: Mapping[str, float] = field(hash=False)

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

    def order(pair: tuple[Score, Score | None]) -> tuple[float, float, WorkerKey, float, WorkerKey]:
        decode, prefill = pair
        source = prefill or decode
        cost = decode.cost + (prefill.cost if prefill is not None else 0.0)
        return cost, tie_breaker(decode.key), decode.key, tie_breaker(source.key), source.key

    pairs = [pair for c in usable if c.role.decodes for pair in _pairs(c, sources, need)]
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


def _pairs(decode: Candidate, sources: Sequence[Candidate], need: Need) -> list[tuple[Score, Score | None]]:
    """The ways to serve it on `decode`: with each prefill worker whose blocks it can use, or alone."""
    matching = [source for source in sources if not mismatch(source.layout, decode.layout)]
    missing = _missing_tokens(decode, need)
    if decode.role is Role.UNIFIED or missing <= need.local_prefill_tokens or not matching:
        return [(_score_decode(decode, need, None), None)]
    return [(_score_decode(decode, need, source), _score_prefill(source, need)) for source in matching]


def _missing_tokens(candidate: Candidate, need: Need) -> int:
    """At least 1: the last token is always computed, for the next one is drawn from it."""
    return max(need.num_tokens - candidate.cached_blocks * candidate.layout.block_size, 1)


def _score_prefill(candidate: Candidate, need: Need) -> Score:
    missing = _missing_tokens(candidate, need)
    terms = {
        "compute": float(missing),
        "queued": float(candidate.queued_tokens),
        "room": _room_term(candidate, missing),
    }
    return Score(candidate.key, Way.REMOTE, missing, terms)


def _score_decode(candidate: Candidate, need: Need, source: Candidate | None) -> Score:
    """`source` is None where it computes the prompt itself."""
    missing = _missing_tokens(candidate, need)
    terms = {
        ("compute" if source is None else "transfer"): missing * (1.0 if source is None else TRANSFER_COST),
        "queued": float(candidate.queued_tokens),
        "streams": STREAM_COST * candidate.streams,
        "room": _room_term(candidate, missing + candidate.layout.block_size),
    }
    if source is not None and source.layout != candidate.layout:
        terms["relaying"] = missing * RELAYING_COST
        terms["converting"] = missing * CONVERTING_COST * (source.layout.dtype != candidate.layout.dtype)
    return Score(candidate.key, Way.LOCAL if source is None else Way.REMOTE, missing, terms)


def _room_term(candidate: Candidate, num_tokens: int) -> float:
    blocks = -(-num_tokens // candidate.layout.block_size)
    return NO_ROOM_COST if blocks > candidate.available_blocks else 0.0
