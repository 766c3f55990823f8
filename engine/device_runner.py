"""Carries out step plans on a device that runs behind the host: nothing here waits for it but `PendingStep.wait`.

What a step drew stays on the device and is what the next one computes. So steps are queued one behind the other, as the
scheduler plans them, and the host reads a step's tokens once it is done. A batch of single tokens replays a graph; any
other is queued operation by operation.

    host:    slots, plan ──► one pinned copy in ──►┐                              ┌──► one pinned copy out ──► wait
    device:                                        forward · draw · newest tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import Attention, AttentionBatch, Span
from engine.device import Device, Graph, Mark
from engine.graphs import Graphs, bucket_sizes
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder
from engine.plan import NewSequence, ScheduledSequence, StepPlan, StepResult
from engine.slots import UNKNOWN, Slots

_IN_FLIGHT = 3
"""Pinned buffers of a kind: one more than steps are in flight, so that none is written while the device reads it."""


class DecodeRows(Protocol):
    """One token a row, in device memory that stays where it is. A row of padding has the spare slot, which is nobody's,
    and length 0: it sees nothing and writes no KV."""

    @property
    def slots(self) -> Tensor:
        """`[batch]` int32: rows of the block tables."""

    @property
    def lengths(self) -> Tensor:
        """`[batch]` int32: positions seen, the row's own included."""


Rows = TypeVar("Rows", bound=DecodeRows)
Numbers = TypeVar("Numbers", int, npt.NDArray[np.int64])


class DeviceAttention(Attention, Protocol[Rows]):
    def decode_buffers(self, batch: int, block_tables: Tensor) -> Rows:
        """For `batch` rows over `block_tables` `[num_slots, max_blocks]` int32 on the device."""

    def static_batch(self, buffers: Rows) -> AttentionBatch:
        """What it does can be recorded: it reads the buffers and the tables anew whenever it is replayed."""


class DeviceSampler(Protocol):
    def fill(self, slot: int, new: NewSequence) -> None:
        """The slot is this sequence's, from the next draw that is queued on."""

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, out: Tensor) -> None:
        """Queues the draw of one token a row into `out` `[rows]` int64, with the parameters of `slots` `[rows]`, at
        `positions` `[rows]`, those of the tokens to draw. Can be recorded. May overwrite the logits."""


class DeviceRunner(Generic[Rows]):
    """For one thread, but for `PendingStep.wait`, which is another's."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        slots: Slots,
        *,
        device: Device,
        attention: DeviceAttention[Rows],
        sampler: DeviceSampler,
    ) -> None:
        """`attention` and `sampler` are of `cache` and `slots`."""
        self._model, self._cache, self._slots = model, cache, slots
        self._device, self._attention, self._sampler = device, attention, sampler
        self._spare, max_blocks = slots.block_tables.shape
        on = model.device
        self._newest = torch.zeros(self._spare + 1, dtype=torch.int64, device=on)
        """Of each slot the newest token, which the host may not know yet; behind them the padding's."""
        self._block_tables = torch.zeros((self._spare + 1, max_blocks), dtype=torch.int32, device=on)
        self._graphs: Graphs[_Buffers[Rows]] = Graphs(bucket_sizes(self._spare))
        self._staging = [device.pinned(4 * self._spare) for _ in range(_IN_FLIGHT)]
        self._drawn = [device.pinned(self._spare) for _ in range(_IN_FLIGHT)]
        self._steps = 0

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> PendingStep:
        self._steps += 1
        begun = self._device.mark() if plan.moves else None
        for move in plan.moves:
            self._cache.move(move)
        moved = self._device.mark() if plan.moves else None
        for new in plan.new:
            self._fill(new)
        drawn = self._compute(plan.scheduled) if plan.scheduled else self._drawn[0][:0]
        return PendingStep(drawn, self._device.mark(), begun, moved)

    @torch.inference_mode()
    def record(self) -> Iterator[tuple[int, int]]:
        """Records the graphs; yields, as each is done, how many are, and of how many. Before anything is computed."""
        for done, _ in enumerate(self._graphs.record(self._device, self._buffers, self._decode), start=1):
            yield done, len(self._graphs.sizes)

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Queues a step of so many tokens, of as many sequences as may be. All KV goes to block 0: before the pool
        holds anything."""
        num_tokens = max(2, num_tokens)
        longest = self._slots.token_ids.shape[1] - 1
        num_spans = max(min(self._spare, num_tokens // 2), -(-num_tokens // longest))
        ends = [num_tokens * (i + 1) // num_spans for i in range(num_spans)]
        spans = [Span(row, 0, end - row, slot=0) for row, end in zip([0, *ends], ends, strict=False)]
        positions = np.concatenate([np.arange(span.count) for span in spans])
        tokens, at, last = self._to_device(np.zeros_like(positions), positions, np.array(ends[: self._spare]) - 1)
        hidden = self._model.forward(tokens, at, self._attention.batch(spans))
        spare = torch.full_like(last, self._spare)
        self._sampler.draw(self._model.logits(hidden[last]), spare, at[last] + 1, torch.empty_like(last))

    @torch.inference_mode()
    def warm_up_decode(self) -> None:
        """Queues a step of padding alone, of as many rows as may be."""
        self._decode(self._buffers(self._spare))

    def repeat_decode(self, num_rows: int) -> None:
        """Queues the last decode step of so many rows once more, for who measures: it writes what it wrote."""
        fitting = self._graphs.fitting(num_rows)
        assert fitting is not None, f"no graph of {num_rows} rows"
        fitting[2].replay()

    def _fill(self, new: NewSequence) -> None:
        self._slots.fill(new)
        self._sampler.fill(new.slot, new)
        newest, blocks = self._to_device(new.token_ids[-1:], new.block_table)
        self._newest[new.slot] = newest[0]
        self._block_tables[new.slot, : len(blocks)] = blocks.to(torch.int32)

    def _compute(self, scheduled: Sequence[ScheduledSequence]) -> Tensor:
        """What is drawn, in pinned memory, once the device has come so far."""
        if all(s.count == 1 and s.sample and len(s.new_blocks) <= 1 for s in scheduled):
            fitting = self._graphs.fitting(len(scheduled))
            if fitting is not None:
                return self._replay(scheduled, *fitting)
        return self._queue(scheduled)

    # --- single tokens, by a graph

    def _buffers(self, size: int) -> _Buffers[Rows]:
        on = self._model.device
        staged = torch.from_numpy(self._padding(size)).to(on)
        drawn = torch.zeros(size, dtype=torch.int64, device=on)
        return _Buffers(staged, self._attention.decode_buffers(size, self._block_tables), drawn)

    def _padding(self, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        rows = np.zeros((4, size), dtype=np.int64)
        rows[0], rows[2] = self._spare, self._block_tables.numel() - 1  # an entry of the spare slot's
        return rows

    def _decode(self, buffers: _Buffers[Rows]) -> None:
        slots, positions, entries, blocks = buffers.staged.unbind()
        self._block_tables.view(-1).index_copy_(0, entries, blocks.to(torch.int32))
        buffers.rows.slots.copy_(slots)
        buffers.rows.lengths.copy_(torch.where(slots == self._spare, 0, positions + 1))
        attention = self._attention.static_batch(buffers.rows)
        hidden = self._model.forward(self._newest[slots], positions, attention)
        self._sampler.draw(self._model.logits(hidden), slots, positions + 1, buffers.drawn)
        self._newest.index_copy_(0, slots, buffers.drawn)

    def _replay(
        self, scheduled: Sequence[ScheduledSequence], size: int, buffers: _Buffers[Rows], graph: Graph
    ) -> Tensor:
        rows = self._padding(size)
        slots, starts, entries, blocks = rows[:, : len(scheduled)]
        slots[:] = [one.slot for one in scheduled]
        starts[:] = [one.start for one in scheduled]
        growing = [row for row, one in enumerate(scheduled) if one.new_blocks]
        if growing:
            entries[growing] = self._entry(slots[growing], self._slots.num_blocks[slots[growing]])
            blocks[growing] = [scheduled[row].new_blocks[0] for row in growing]
            self._slots.append_block_each(slots[growing], blocks[growing])
        self._slots.append_unknown_each(slots, starts)
        staging = self._staging[self._steps % _IN_FLIGHT][: 4 * size].view(4, size)
        staging.copy_(torch.from_numpy(rows))
        buffers.staged.copy_(staging, non_blocking=True)
        graph.replay()
        return self._bring_out(buffers.drawn[: len(scheduled)])

    # --- any other batch

    def _queue(self, scheduled: Sequence[ScheduledSequence]) -> Tensor:
        spans: list[Span] = []
        entries: list[int] = []
        blocks: list[int] = []
        row = 0
        for one in scheduled:
            held = int(self._slots.num_blocks[one.slot])
            entries += [self._entry(one.slot, held + i) for i in range(len(one.new_blocks))]
            blocks += one.new_blocks
            self._slots.append_blocks(one.slot, one.new_blocks)
            spans.append(self._slots.span(one, row))
            row += one.count
        token_ids = np.concatenate([self._slots.token_ids[s.slot, s.start : s.end] for s in spans]).astype(np.int64)
        slots = np.repeat([s.slot for s in spans], [s.count for s in spans])
        positions = np.concatenate([np.arange(s.start, s.end) for s in spans])
        known, slot_of, at, of_tables, to_tables = self._to_device(token_ids, slots, positions, entries, blocks)
        self._block_tables.view(-1).index_copy_(0, of_tables, to_tables.to(torch.int32))
        tokens = torch.where(known == UNKNOWN, self._newest[slot_of], known)
        hidden = self._model.forward(tokens, at, self._attention.batch(spans))
        lasts = [span.row + span.count - 1 for span, one in zip(spans, scheduled, strict=True) if one.sample]
        if not lasts:
            return self._drawn[0][:0]
        (last,) = self._to_device(lasts)
        drawn = torch.empty_like(last)
        self._sampler.draw(self._model.logits(hidden[last]), slot_of[last], at[last] + 1, drawn)
        self._newest.index_copy_(0, slot_of[last], drawn)
        for one in scheduled:
            if one.sample:
                self._slots.append_token(one.slot, UNKNOWN)
        return self._bring_out(drawn)

    def _to_device(self, *parts: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[Tensor, ...]:
        """In one copy."""
        joined = torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
        pinned = joined.pin_memory() if self._model.device.type == "cuda" else joined
        on_device = pinned.to(self._model.device, non_blocking=True)
        return torch.split(on_device, [len(part) for part in parts])

    def _entry(self, slot: Numbers, column: Numbers) -> Numbers:
        """Place in the block tables, flat."""
        return slot * self._block_tables.shape[1] + column

    def _bring_out(self, drawn: Tensor) -> Tensor:
        out = self._drawn[self._steps % _IN_FLIGHT][: len(drawn)]
        out.copy_(drawn, non_blocking=True)
        return out


@dataclass(frozen=True, slots=True)
class _Buffers(Generic[Rows]):
    """Of one graph."""

    staged: Tensor
    """`[4, size]` int64: slots, positions, entries of the block tables, and the blocks that go there."""
    rows: Rows
    drawn: Tensor
    """`[size]` int64."""


class PendingStep:
    def __init__(self, drawn: Tensor, done: Mark, begun: Mark | None, moved: Mark | None) -> None:
        self._drawn, self._done, self._begun, self._moved = drawn, done, begun, moved

    def wait(self) -> StepResult:
        self._done.wait()
        seconds = self._moved.seconds_since(self._begun) if self._moved is not None and self._begun is not None else 0.0
        return StepResult(tuple(self._drawn.tolist()), seconds)
