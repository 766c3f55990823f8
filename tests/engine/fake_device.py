"""A device on the CPU: its graphs repeat recorded operations on recorded tensors, as a GPU's do. So whatever a step
took from the host while it was recorded stays what it was then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from engine.attention import AttentionBatch
from engine.device import Mark
from engine.kernels.reference import ReferenceAttention, ReferenceBatch
from engine.kv_cache import KVCache
from engine.plan import NewSequence


class FakeDevice:
    def __init__(self) -> None:
        self.marks = self.captures = self.replays = 0

    def mark(self) -> FakeMark:
        self.marks += 1
        return FakeMark(self.marks)

    def pinned(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def capture(self, body: Callable[[], None]) -> FakeGraph:
        self.captures += 1
        recorder = _Recorder()
        with recorder:
            body()
        return FakeGraph(self, recorder.calls)


class FakeMark:
    def __init__(self, number: int) -> None:
        self.number = number
        self.waited = False

    def wait(self) -> None:
        self.waited = True

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, FakeMark), "marks of two devices"
        return float(self.number - earlier.number)


class FakeGraph:
    def __init__(self, device: FakeDevice, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        self._device, self._calls = device, calls

    def replay(self) -> None:
        self._device.replays += 1
        for operation, args, kwargs, recorded in self._calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_flatten(recorded)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host waits for the device while a graph is recorded"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


@dataclass(frozen=True, slots=True)
class FakeRows:
    slots: Tensor
    lengths: Tensor
    block_tables: Tensor


class FakeAttention(ReferenceAttention):
    def decode_buffers(self, batch: int, block_tables: Tensor) -> FakeRows:
        return FakeRows(torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32), block_tables)

    def static_batch(self, buffers: FakeRows) -> AttentionBatch:
        return _DenseDecode(self._cache, buffers)


class _DenseDecode(ReferenceBatch):
    """All that a block table could name, masked: slow, and with nothing from the host."""

    def __init__(self, cache: KVCache, rows: FakeRows) -> None:
        layout = cache.layout
        self._num_kv_heads, self._head_dim = layout.num_kv_heads, layout.head_dim
        self._block_size, self._tiles_per_layer = layout.block_size, 2 * layout.num_kv_heads
        self._cache, self._vectors, self._lengths = cache, cache.tensor.view(-1, layout.head_dim), rows.lengths
        self._tables = rows.block_tables[rows.slots.long()].long()
        # What padding writes is what the first row writes, to the same place.
        self._writers = torch.where(rows.lengths > 0, torch.arange(len(rows.slots)), 0)
        positions = (rows.lengths.long() - 1).clamp(min=0)[self._writers]
        blocks = self._tables[self._writers].gather(1, (positions // self._block_size)[:, None])
        tiles = blocks * layout.num_layers * self._tiles_per_layer + torch.arange(self._tiles_per_layer)
        self._slots = (tiles * self._block_size + (positions % self._block_size)[:, None]).view(-1)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        super().write(layer, key[self._writers], value[self._writers])

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        batch, num_heads, head_dim = query.shape
        group = num_heads // self._num_kv_heads
        keys_values = self._cache.tensor[:, layer][self._tables]  # [batch, blocks, 2, heads, block_size, head_dim]
        key, value = keys_values.permute(2, 0, 3, 1, 4, 5).reshape(2, batch, self._num_kv_heads, -1, head_dim)
        position, lengths = torch.arange(key.shape[2]), self._lengths[:, None]
        seen = position < lengths if window is None else (position < lengths) & (position >= lengths - window)
        seen = seen[:, None, :, None]
        key, value = torch.where(seen, key, 0.0), torch.where(seen, value, 0.0)
        scores = query.view(batch, self._num_kv_heads, group, head_dim) @ key.transpose(-1, -2) * head_dim**-0.5
        scores = torch.where(seen.transpose(-1, -2), scores, -torch.inf)
        weights = torch.where(self._lengths[:, None, None, None] > 0, scores.softmax(dim=-1), 0.0)
        return (weights @ value).view(batch, -1)


class FakeSampler:
    """The most probable token for greedy parameters; else a number made of slot, seed and position."""

    def __init__(self, num_slots: int) -> None:
        self._seeds = torch.full((num_slots + 1,), -1)

    def fill(self, slot: int, new: NewSequence) -> None:
        self._seeds[slot] = -1 if new.sampling.greedy else new.sampling.seed or 0

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, out: Tensor) -> None:
        seeds = self._seeds[slots]
        out.copy_(torch.where(seeds < 0, logits.argmax(dim=-1), (31 * seeds + positions) % logits.shape[-1]))
