"""Owns which swap slot, room for one block in host memory, is whose. Pure bookkeeping: no torch, no bytes."""

from __future__ import annotations

from collections.abc import Iterable

from baton.errors import InternalError
from engine.plan import SwapSlot


class SwapPool:
    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = [SwapSlot(slot) for slot in reversed(range(num_slots))]
        self._taken = [False] * num_slots

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[SwapSlot]:
        if count > len(self._free):
            raise InternalError(f"{count} swap slots taken of {len(self._free)} available")
        taken = [self._free.pop() for _ in range(count)]
        for slot in taken:
            self._taken[slot] = True
        return taken

    def free(self, slots: Iterable[SwapSlot]) -> None:
        for slot in slots:
            if not self._taken[slot]:
                raise InternalError(f"swap slot {slot} is freed twice")
            self._taken[slot] = False
            self._free.append(slot)
