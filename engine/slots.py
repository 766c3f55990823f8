"""What a runner keeps of each request: tokens, block table, parameters. In host memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from baton.sampling import SamplingParams
from engine.attention import Span
from engine.plan import NewSequence, ScheduledSequence
from engine.sampler import Draw

IntArray = npt.NDArray[np.int64]

_GREEDY = SamplingParams()
UNKNOWN = -1
"""In place of a token that a device has drawn and the host has not read."""


class Slots:
    """Rows of arrays, one a request, changed in place: no step touches more of a context than the plan names."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        # One more than the model's length: the last token is drawn, never computed.
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.block_tables = np.zeros((max_num_seqs, -(-(max_model_len + 1) // block_size)), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.sampling = [_GREEDY] * max_num_seqs
        self._block_size = block_size

    def fill(self, new: NewSequence) -> None:
        slot, known = new.slot, len(new.token_ids)
        assert known < self.token_ids.shape[1], f"{known} tokens exceed slots of {self.token_ids.shape[1]}"
        self.token_ids[slot, :known] = new.token_ids
        self.num_tokens[slot] = known
        self.num_prompt_tokens[slot] = new.num_prompt_tokens
        self.num_blocks[slot] = 0
        self.append_blocks(slot, new.block_table)
        self.sampling[slot] = new.sampling

    def append_blocks(self, slot: int, blocks: tuple[int, ...]) -> None:
        held = int(self.num_blocks[slot])
        self.block_tables[slot, held : held + len(blocks)] = blocks
        self.num_blocks[slot] = held + len(blocks)

    def append_token(self, slot: int, token_id: int) -> None:
        self.token_ids[slot, self.num_tokens[slot]] = token_id
        self.num_tokens[slot] += 1

    def append_block_each(self, slots: IntArray, blocks: IntArray) -> None:
        """A block to each of different slots."""
        held = self.num_blocks[slots]
        self.block_tables[slots, held] = blocks
        self.num_blocks[slots] = held + 1

    def append_unknown_each(self, slots: IntArray, starts: IntArray) -> None:
        """To each of different slots the token that is drawn behind its last known one, which is at `starts`."""
        known = self.num_tokens[slots]
        assert (starts + 1 == known).all(), f"slots {slots} compute {starts} of {known} known tokens and draw"
        held = self.num_blocks[slots] * self._block_size
        assert (starts < held).all(), f"slots {slots} compute {starts}, and their blocks hold {held}"
        self.token_ids[slots, known] = UNKNOWN
        self.num_tokens[slots] = known + 1

    def span(self, scheduled: ScheduledSequence, row: int) -> Span:
        slot, end = scheduled.slot, scheduled.start + scheduled.count
        held = int(self.num_blocks[slot])
        assert scheduled.count > 0, f"{scheduled} computes nothing"
        assert end <= self.num_tokens[slot], f"{scheduled}: {self.num_tokens[slot]} tokens known"
        assert end <= held * self._block_size, f"{scheduled}: {held} blocks hold too little"
        return Span(row, scheduled.start, scheduled.count, slot)

    def draw(self, scheduled: ScheduledSequence) -> Draw:
        slot, end = scheduled.slot, scheduled.start + scheduled.count
        assert end == self.num_tokens[slot], f"{scheduled} draws behind {end} of {self.num_tokens[slot]} known tokens"
        return Draw(self.sampling[slot], position=end, num_generated=end - int(self.num_prompt_tokens[slot]))
