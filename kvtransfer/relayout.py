"""Re-lays blocks of one layout into blocks of another: other block size, dtype or share of the heads, the same KV.

    source, blocks of 8         | 0 | 1 | 2 | 3 | 4 | 5 |      fetched into staging and verified there,
    destination, blocks of 24   |     0     |     1     |      then copied a block at a time

Pure but for the bytes that it is given. It decides which source blocks are needed and where their values go; whether a
block may be read, and by whom, is for others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from baton.errors import LayoutMismatch, VerifyFailed
from baton.layout import KVLayout, mismatch, shared_heads
from kvtransfer.convert import STORAGE, Array, converter
from kvtransfer.memory import PoolMemory


@dataclass(frozen=True, slots=True)
class Share:
    """What one source gives of a prompt's KV."""

    source: KVLayout
    destination: KVLayout
    heads: range
    """Of the model's: those that are taken from this source."""

    @property
    def as_it_is(self) -> bool:
        """A block of the source is a block of the destination, byte for byte."""
        return self.source == self.destination and self.heads == self.destination.heads


def shares(sources: Sequence[KVLayout], destination: KVLayout) -> list[Share]:
    """One share a source, which together are all heads of `destination`, each once. Raises LayoutMismatch, which names
    what differs or lacks."""
    taken: dict[int, range] = {}
    upto = destination.heads.start
    for number in sorted(range(len(sources)), key=lambda n: sources[n].heads.start):
        difference = mismatch(sources[number], destination)
        if difference:
            raise LayoutMismatch(difference)
        has = shared_heads(sources[number], destination)
        if has.start > upto:
            break
        taken[number] = range(upto, max(has.stop, upto))
        upto = max(has.stop, upto)
    if upto < destination.heads.stop:
        raise LayoutMismatch(
            f"no source holds KV head {upto}; the destination needs each from "
            f"{destination.heads.start} to {destination.heads.stop - 1}"
        )
    return [Share(source, destination, taken.get(n, range(0))) for n, source in enumerate(sources)]


class Relayout:
    """Of one share into the blocks of one landing. Its methods may be called from several threads at once."""

    def __init__(
        self,
        share: Share,
        memory: PoolMemory,
        destination: Sequence[int],
        first_missing: int,
        num_tokens: int,
        lock: threading.Lock,
    ) -> None:
        """`destination` are places in `memory`, in the order of the prompt; those before position `first_missing` hold
        their KV already, and are not touched. `lock` is that of the landing, which may have several shares."""
        self._memory = memory
        self._destination = destination
        self._share = share
        self._sizes = share.source.block_size, share.destination.block_size
        self._tokens = range(min(first_missing * self._sizes[1], num_tokens), num_tokens)
        self._convert = converter(share.source.dtype, share.destination.dtype)
        self._lock = lock

    @property
    def first_block(self) -> int:
        """The first of the source's blocks that is needed; the number of its blocks where none is."""
        if not self._tokens or not self._share.heads:
            return -(-self._tokens.stop // self._sizes[0])
        return self._tokens.start // self._sizes[0]

    def relay(self, staged: Mapping[int, memoryview]) -> None:
        """Writes what the source's blocks hold, by position, into the blocks that it belongs to. Raises VerifyFailed
        for a value that the destination's dtype can't hold."""
        by_target: dict[int, list[int]] = {}
        for position in staged:
            for target in self._targets(position):
                by_target.setdefault(target, []).append(position)
        for target, positions in by_target.items():
            self._fill(target, {position: staged[position] for position in positions})

    def _targets(self, position: int) -> range:
        tokens = self._tokens_of(position)
        return range(tokens.start // self._sizes[1], -(-tokens.stop // self._sizes[1])) if tokens else range(0)

    def _tokens_of(self, position: int) -> range:
        """Those that are wanted of one of the source's blocks."""
        size = self._sizes[0]
        return range(max(position * size, self._tokens.start), min((position + 1) * size, self._tokens.stop))

    def _fill(self, target: int, staged: Mapping[int, memoryview]) -> None:
        index = self._destination[target]
        view = self._memory.view(index)
        if view is not None:
            self._copy(target, staged, _array(view, self._share.destination))
            return
        # Memory that the host can't reach is written a block at a time; of one that is filled in parts, what is there
        # already has to be brought, and nobody else may write it meanwhile.
        with self._lock:
            whole = self._fills(target, staged)
            block = memoryview(bytearray(self._memory.block_bytes if whole else self._memory.read(index)))
            self._copy(target, staged, _array(block, self._share.destination))
            self._memory.write(index, block)

    def _fills(self, target: int, positions: Iterable[int]) -> bool:
        size = self._sizes[1]
        tokens = (self._tokens_of(position) for position in positions)
        parts = (min(t.stop, (target + 1) * size) - max(t.start, target * size) for t in tokens)
        return sum(parts) == size and self._share.heads == self._share.destination.heads

    def _copy(self, target: int, staged: Mapping[int, memoryview], block: Array) -> None:
        share, (from_size, to_size) = self._share, self._sizes
        from_heads, to_heads = (_slice(share.heads, layout.heads.start) for layout in (share.source, share.destination))
        for position, data in staged.items():
            wanted = self._tokens_of(position)
            tokens = range(max(wanted.start, target * to_size), min(wanted.stop, (target + 1) * to_size))
            values = _array(data, share.source)[:, :, from_heads, _slice(tokens, position * from_size)]
            out = block[:, :, to_heads, _slice(tokens, target * to_size)]
            try:
                self._convert(values, out)
            except OverflowError as error:
                raise VerifyFailed(
                    f"block {position} holds {share.source.dtype} values that are infinite in {error}; run both "
                    f"workers with --dtype {share.source.dtype}"
                ) from None


def _array(data: memoryview, layout: KVLayout) -> Array:
    return cast(Array, np.frombuffer(data, STORAGE[layout.dtype]).reshape(layout.block_shape))


def _slice(of: range, start: int) -> slice:
    return slice(of.start - start, of.stop - start)
