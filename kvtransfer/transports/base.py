"""What a transport is: a way to another worker's blocks.

A transport moves bytes into blocks of this worker's pool and says what became of each. It does not decide what to
fetch, nor what follows from a wrong checksum, and owns no lifetime: it passes through the gate that it is given around
every write, so that the gate knows whether a writer may still come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from baton.ids import TransferId
from kvtransfer.gate import Gate
from kvtransfer.memory import PoolMemory

MAX_ADDRESS_BYTES = 4096
MAX_FETCH_BLOCKS = 4096
"""Most blocks of one fetch."""


class Endpoint(NamedTuple):
    """A way to a source's bytes, as the source tells it. The address is understood by its transport alone."""

    transport: str
    address: bytes


class Want(NamedTuple):
    """One block to bring over."""

    source: int
    """Place in the source's pool."""
    generation: int
    """The generation that it must have, before and after it is read."""
    destination: int
    """Place in this worker's pool."""
    checksum: int | None = None
    """What its bytes must sum up to where they land, by that memory's own kind of checksum; None: whoever fetches does
    not ask."""


class Fetched(Enum):
    """What became of one wanted block."""

    LANDED = "landed"
    """Its bytes are in place, were of the right generation throughout, and have the checksum that was asked for, if one
    was. Where a host lands them they are summed by the thread that does, piece by piece, while they are in its cache:
    later they would have to come from memory once more. A device sums them where they are."""
    STALE = "stale"
    """The source's block has another generation by now; what landed is worthless."""
    DAMAGED = "damaged"
    """Its bytes are in place and have another checksum."""
    REFUSED = "refused"
    """The source does not give this block out: not sealed, not of this set, or the set has just ended."""


class Connection(Protocol):
    """A way to one source. Used by many pulls at once."""

    @property
    def slots(self) -> asyncio.Semaphore:
        """Of the fetches that it makes at once. A pull keeps one for each of its fetches: so pulls that begin together
        end one behind the other, not all with the last."""

    @property
    def fetch_bytes(self) -> int:
        """Of one fetch at most: enough for the way there and back to cost little, little enough that as many as there
        are slots share what there is to fetch."""

    @property
    def alive(self) -> bool:
        """False once it is known that the source behind it is gone."""

    async def fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        """Brings the blocks over, in any order, and says what became of each, in the order of `wants`.

        When it returns, nobody writes any more on its behalf. When it raises or is cancelled somebody may, which the
        gate then counts, and which ends within the transport's own timeout. Raises PeerLost where the source can't be
        reached, TransferRefused where it does not know the set (any more) or the gate is closed.
        """

    async def close(self) -> None:
        """Lets go of the source. Fetches under way end with PeerLost or run out."""


def fetched(want: Want, before: int, after: int, is_right: bool) -> Fetched:
    """Of a block whose generation was looked up before and behind its bytes."""
    if not before == after == want.generation:
        return Fetched.STALE
    return Fetched.LANDED if is_right else Fetched.DAMAGED


def right(want: Want, checksum: int) -> bool:
    """Whether a block that landed with this checksum is what is wanted."""
    return want.checksum in (None, checksum)


def copied_right(copy: Callable[..., list[int]], wants: Sequence[Want]) -> list[bool]:
    """Lets `copy` (which takes pairs of places and `summed`, and returns checksums, as a Copier does) land the blocks.
    Which of them have the checksum that is wanted."""
    summed = any(want.checksum is not None for want in wants)
    sums = copy([(want.source, want.destination) for want in wants], summed=summed)
    if not summed:
        return [True] * len(wants)
    return [right(want, checksum) for want, checksum in zip(wants, sums, strict=True)]


def landed_right(memory: PoolMemory, wants: Sequence[Want]) -> list[bool]:
    """Which of the blocks, as they lie in `memory` now, have the checksum that is wanted."""
    asked = [want.destination for want in wants if want.checksum is not None]
    sums = dict(zip(asked, memory.checksums(asked), strict=True)) if asked else {}
    return [want.checksum is None or sums[want.destination] == want.checksum for want in wants]


def runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Neighbours in the list that are neighbours in both pools, as (first source, first destination, count)."""
    start = 0
    for at in range(1, len(pairs) + 1):
        if at < len(pairs):
            (source, destination), next_pair = pairs[at - 1], pairs[at]
            if next_pair == (source + 1, destination + 1):
                continue
        yield *pairs[start], at - start
        start = at
