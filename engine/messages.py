"""What others say to the engine, and what it says back: all there is between its thread and the rest.

Commands go in through `EngineThread.send`, events come out in one batch a step. A request has one of
three tasks:

LOCAL      AddRequest ────────────────────────────► Tokens… ► Ended
PREFILL    AddRequest ► Offered ► Sealed… ────────► Tokens  ► Ended(PREFILLED)     ReleaseOffer ► (blocks go)
RECEIVE    AddRequest ► Reserved                            Commit ► Tokens… ► Ended
                        └ or DropLanding(in_flight) ► Ended; FreeQuarantined ► (blocks go)

LOCAL and PREFILL may have the beginning of their prompt fetched from another worker that holds it (num_fetch_blocks):

           AddRequest ► Reserved    CommitPrefix(num_blocks) ► as above, with so many blocks less to compute
                        └ or DropPrefix, where a writer is left ► as above; FreeQuarantined ► (blocks go)

And other workers may read what nobody prefilled for them: Lend ► Lent, for blocks that are cached; MoveAway ► Offered ►
Ended(MOVED), for those of a stream that goes on elsewhere. Both end with ReleaseOffer.

Every AddRequest gets exactly one Ended. Abort may come at any time; it marks, and blocks that others may
still read or write stay until ReleaseOffer, DropLanding or FreeQuarantined names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.ids import AttemptId, BlockHash, BlockRef
from baton.sampling import SamplingParams


class Task(Enum):
    """What is to be done with a prompt here."""

    LOCAL = "local"
    """Compute the prompt, decode to the end."""
    PREFILL = "prefill"
    """Compute the prompt, sample one token, hold the blocks for whoever comes for them."""
    RECEIVE = "receive"
    """Reserve blocks, wait until somebody has filled them, decode from there."""


class EndReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    PREFILLED = "prefilled"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    INVALID = "invalid"
    """It can't be served anywhere."""
    HANDOFF_FAILED = "handoff_failed"
    UNAVAILABLE = "unavailable"
    """This engine can't go on with it; another may."""
    MOVED = "moved"
    """It was asked to go on elsewhere; what is computed is offered."""


# --- commands


@dataclass(frozen=True, slots=True)
class AddRequest:
    id: AttemptId
    task: Task
    token_ids: tuple[int, ...]
    """The prompt, and behind it what earlier attempts generated."""
    num_prompt_tokens: int
    sampling: SamplingParams
    """With max_tokens and seed filled in."""
    cache_salt: bytes = b""
    num_fetch_blocks: int = 0
    """The prompt's first so many blocks can be had from another worker: those that are not cached here are reserved
    for that. 0 for a request that receives them all."""


@dataclass(frozen=True, slots=True)
class Abort:
    id: AttemptId
    reason: EndReason = EndReason.CANCELLED
    message: str = ""


@dataclass(frozen=True, slots=True)
class ReleaseOffer:
    """The source set of a PREFILL request is in a terminal state: nobody reads its blocks any more."""

    id: AttemptId


@dataclass(frozen=True, slots=True)
class Commit:
    """The landed blocks of a RECEIVE request are verified and may be read; `first_token` is the source's."""

    id: AttemptId
    first_token: int
    shareable: bool = True
    """Whether these blocks, and what is computed on from them, may serve other requests as a cached prefix. Not where
    they hold other values than this worker would have computed."""


@dataclass(frozen=True, slots=True)
class DropLanding:
    """The landing of a RECEIVE request failed or is not wanted.

    With `in_flight` a writer may still reach the blocks: they are quarantined until FreeQuarantined.
    """

    id: AttemptId
    in_flight: bool
    reason: EndReason = EndReason.HANDOFF_FAILED
    message: str = ""


@dataclass(frozen=True, slots=True)
class FreeQuarantined:
    id: AttemptId


@dataclass(frozen=True, slots=True)
class CommitPrefix:
    """Of a fetched prefix, the first `num_blocks` blocks may be read, and nobody writes the others any more: they are
    computed."""

    id: AttemptId
    num_blocks: int
    shareable: bool = True
    """As for Commit."""


@dataclass(frozen=True, slots=True)
class DropPrefix:
    """The fetch failed, and a writer may still reach the blocks: they are quarantined until FreeQuarantined. The
    request goes on with others."""

    id: AttemptId


@dataclass(frozen=True, slots=True)
class Lend:
    """Another worker asks for these blocks by name; `id` is its request's."""

    id: AttemptId
    hashes: tuple[BlockHash, ...]
    """Parents before children."""


@dataclass(frozen=True, slots=True)
class MoveAway:
    """The request is to go on elsewhere: it ends here, and the blocks that it has filled are offered."""

    id: AttemptId


Command = (
    AddRequest
    | Abort
    | ReleaseOffer
    | Commit
    | DropLanding
    | FreeQuarantined
    | CommitPrefix
    | DropPrefix
    | Lend
    | MoveAway
)


# --- events


@dataclass(frozen=True, slots=True)
class Offered:
    """The blocks that will hold the prompt's KV, in its order. A Sealed follows for those that do already."""

    id: AttemptId
    blocks: tuple[BlockRef, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """The offered blocks up to, not including, position `end` are full and will not change any more."""

    id: AttemptId
    end: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks for all tokens of a RECEIVE request, or for the prefix that is to be fetched. Those before position
    `first_missing` hold their KV."""

    id: AttemptId
    blocks: tuple[BlockRef, ...]
    first_missing: int


@dataclass(frozen=True, slots=True)
class Tokens:
    id: AttemptId
    index: int
    """How many tokens had been generated before these, over all attempts."""
    token_ids: tuple[int, ...]
    num_cached_tokens: int
    """Of the prompt; found in the prefix cache, not computed here."""


@dataclass(frozen=True, slots=True)
class Ended:
    id: AttemptId
    reason: EndReason
    message: str = ""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """These hashes can be hit from now on; parents come before children."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class BlocksEvicted:
    """These can't be any more; children come before parents."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Lent:
    """Answers Lend: those of the blocks, from the first on, that are here. They stay until ReleaseOffer; where there
    are none, nothing is held."""

    id: AttemptId
    blocks: tuple[BlockRef, ...]


RequestEvent = Offered | Sealed | Reserved | Tokens | Ended | Lent
Event = RequestEvent | BlocksStored | BlocksEvicted


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks by state; they add up to `total`. One of the pool's invariants, and a metric."""

    free: int
    cached: int
    active: int
    offered: int
    landing: int
    quarantined: int

    @property
    def total(self) -> int:
        return self.free + self.cached + self.active + self.offered + self.landing + self.quarantined

    @property
    def available(self) -> int:
        return self.free + self.cached


@dataclass(frozen=True, slots=True)
class Load:
    running: int
    waiting: int
    swapped: int
    """Of those that wait: their KV is in host memory."""
    queued_tokens: int
    """Prompt tokens taken on and not computed yet."""
    blocks: BlockCounts
