"""A request inside the engine: counters and holds, no behaviour of its own. `Requests` (requests.py) owns it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.hashing import chain_hash
from baton.ids import AttemptId, BlockHash, BlockIndex
from engine.messages import AddRequest, Task
from engine.plan import SwapSlot


class Phase(Enum):
    """
    WAITING ► RUNNING ► ENDED                        LOCAL, PREFILL
       ▲         │ preempted
       │         ▼
       ├────► LEAVING, while a step in flight uses its blocks
       │         ▼
       │      SWAPPED ► RUNNING
       └─ or, with nothing swapped out, back to WAITING
    WAITING ► RECEIVING ► RUNNING ► ENDED            RECEIVE; once committed it is like any other
                  └► or, where a fetched prefix did not come, back to WAITING
    """

    WAITING = "waiting"
    """Holds nothing."""
    SWAPPED = "swapped"
    """Its KV is in host memory; it holds nothing of the pool."""
    RECEIVING = "receiving"
    """Its blocks are reserved; a transfer fills them."""
    RUNNING = "running"
    """Has a slot, and blocks for every token it knows."""
    LEAVING = "leaving"
    """Is preempted; keeps slot and blocks until no step in flight uses them."""
    ENDED = "ended"
    """Has had its terminal reply; what it holds goes once no step in flight uses it."""


@dataclass(slots=True, eq=False)
class Request:
    add: AddRequest
    tokens: list[int]
    """All that is known: the prompt and the generated tokens."""
    last_hash: BlockHash
    """Chain hash of the last of `hashes`, or the root."""
    most_tokens: int
    """With so many tokens it has all that it may have."""
    phase: Phase = Phase.WAITING
    num_computed: int = 0
    """Tokens whose KV is in `blocks`, by the steps that are done."""
    num_planned: int = 0
    """The same, with the steps in flight: where the next step goes on."""
    num_drawing: int = 0
    """Tokens that steps in flight draw: 1 at most, for the one behind it needs it."""
    steps_in_flight: int = 0
    """That use its slot or its blocks."""
    blocks: list[BlockIndex] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were needed."""
    slot: int = -1
    num_cached: int | None = None
    """Prompt tokens found in the prefix cache at first admission; None before it."""
    num_hit_blocks: int = 0
    """The first so many of `blocks` were found in the prefix cache at the last admission."""
    num_landing_blocks: int = 0
    """So many behind these are being written by a transfer."""
    fetches: bool = False
    """Whether the beginning of its prompt is still to be had from another worker."""
    swapped: list[SwapSlot] = field(default_factory=list)
    """Where the KV of its first `num_swapped` tokens is in host memory, block by block."""
    num_swapped: int = 0
    shareable: bool = True
    """Its blocks beyond the hits may be published in the prefix cache: all their KV is such as is computed here."""

    @property
    def id(self) -> AttemptId:
        return self.add.id

    @property
    def task(self) -> Task:
        return self.add.task

    @property
    def num_tokens(self) -> int:
        """Known or being drawn."""
        return len(self.tokens) + self.num_drawing

    @property
    def num_unplanned(self) -> int:
        return len(self.tokens) + self.num_drawing - self.num_planned

    @property
    def num_generated(self) -> int:
        """Without what is being drawn."""
        return len(self.tokens) - self.add.num_prompt_tokens

    def extend_hashes(self, num_tokens: int, block_size: int) -> None:
        """Names all blocks that are full with the first `num_tokens` tokens."""
        for start in range(len(self.hashes) * block_size, num_tokens - block_size + 1, block_size):
            self.last_hash = chain_hash(self.last_hash, self.tokens[start : start + block_size])
            self.hashes.append(self.last_hash)
