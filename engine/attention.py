"""What the model and the runner see of attention: a batch's spans over block tables, written to and attended to.

Those who carry it out are in engine/kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

BlockTables = npt.NDArray[np.int32]
"""`[num_slots, max_blocks]`, changed in place by the runner."""


@dataclass(frozen=True, slots=True)
class Span:
    """Of one sequence: compute tokens [start, start + count), whose rows in the batch begin at `row`."""

    row: int
    start: int
    count: int
    slot: int
    """Row of the block tables; it is filled at least as far as the last computed token."""

    @property
    def end(self) -> int:
        return self.start + self.count


class AttentionBatch(Protocol):
    """One step's sequences over one pool. Made once a step, used by every layer."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Puts the batch's keys and values, each `[num_tokens, num_kv_heads, head_dim]`, where their positions are."""

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        """Softmax attention of `query` `[num_tokens, num_heads, head_dim]` to what is written of its sequence, itself
        included: `[num_tokens, num_heads * head_dim]`. `window`: only to so many last positions."""


class Attention(Protocol):
    """Of one pool and one array of block tables. For one thread."""

    def batch(self, spans: Sequence[Span]) -> AttentionBatch:
        """`spans`, by ascending row, without gaps. The block tables may change once the batch is done with."""
