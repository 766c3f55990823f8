"""The one thing that passes from the scheduler to the model runner: a step as plain data, frozen, ints only.

The runner keeps each request's token ids and block table in a *slot*, a row of its own arrays, so that a plan
carries only what is new. Sequences of the plan are computed together: "compute tokens [start, start + count)"
is prefix hits, prefill chunks and decode in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from baton.ids import BlockIndex
from baton.sampling import SamplingParams

SwapSlot = NewType("SwapSlot", int)
"""Room for one block in host memory."""


class MoveKind(Enum):
    COPY = "copy"
    """From a block that others read to one of the request's own, which it will write: copy on write."""
    SWAP_OUT = "swap_out"
    """From a block to a swap slot."""
    SWAP_IN = "swap_in"
    """From a swap slot to a block."""


@dataclass(frozen=True, slots=True)
class Move:
    """Copies one whole block's content."""

    kind: MoveKind
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class NewSequence:
    """Fills a slot: first time, or again after preemption."""

    slot: int
    token_ids: tuple[int, ...]
    """All that is known: prompt and generated tokens."""
    num_prompt_tokens: int
    block_table: tuple[BlockIndex, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens [start, start + count) of a slot; where `sample`, draw the token behind them.

    The runner appends the drawn token to the slot by itself; a plan never repeats what the runner knows.
    """

    slot: int
    start: int
    count: int
    new_blocks: tuple[BlockIndex, ...]
    """To append to the slot's block table before computing."""
    sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    new: tuple[NewSequence, ...]
    """In force before `scheduled`."""
    scheduled: tuple[ScheduledSequence, ...]
    """In the order of the batch: decodes and chunks mixed."""
    moves: tuple[Move, ...] = ()
    """Done in this order, before anything is computed."""

    @property
    def is_empty(self) -> bool:
        """Nothing to do: such a plan is not run. `new` alone waits for the next one."""
        return not self.scheduled and not self.moves

    @property
    def num_tokens(self) -> int:
        return sum(s.count for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    token_ids: tuple[int, ...]
    """One drawn token for each scheduled sequence with `sample`, in the plan's order."""
    move_seconds: float = 0.0
    """What the plan's moves took."""
