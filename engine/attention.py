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


@dataclass(frozen=True, slots=True)
class Rotary:
    """By how much a step's query and key heads are turned: two `[num_tokens, head_dim / 2]`, float32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """A layer's RMS norms of single heads: weights `[head_dim]`."""

    query: Tensor
    key: Tensor
    eps: float


class AttentionBatch(Protocol):
    """One step's sequences over one pool. Made once a step, used by every layer."""

    def rotate_and_write(self, layer: int, qkv: Tensor, rotary: Rotary, norms: HeadNorms | None) -> Tensor:
        """Norms query and key heads, where there are norms, turns them, and writes keys and values.

        `qkv`, `[num_tokens, (num_heads + 2 num_kv_heads) * head_dim]`, belongs to the batch from then on. Returns the
        query for `attend`.
        """

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Puts the batch's keys and values, each `[num_tokens, num_kv_heads, head_dim]`, where their positions are."""

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        """Softmax attention of `query` `[num_tokens, num_heads, head_dim]` to what is written of its sequence, itself
        included: `[num_tokens, num_heads * head_dim]`, good until the batch attends again. `window`: only to so many
        last positions."""


class Attention(Protocol):
    """Of one pool and one array of block tables. For one thread."""

    def batch(self, spans: Sequence[Span]) -> AttentionBatch:
        """`spans`, by ascending row, without gaps. The block tables may change once the batch is done with."""
