"""Carries out plans with the fake model, and looks at the pool's books while it reads: invariant 2 at its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from baton.ids import BlockIndex
from engine.block_pool import BlockPool, Hold
from engine.plan import Move, MoveKind, StepPlan, StepResult
from sim import model
from sim.memory import SimMemory

_READABLE = (Hold.ACTIVE, Hold.OFFERED)


class SimRunner:
    def __init__(self, memory: SimMemory, pool: BlockPool, block_size: int, broken: Callable[[str], None]) -> None:
        self._memory = memory
        self._pool = pool
        self._block_size = block_size
        self._broken = broken
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[int, list[BlockIndex]] = {}
        self._swapped: dict[int, bytes] = {}
        self.moved: Counter[MoveKind] = Counter()

    def run(self, plan: StepPlan) -> StepResult:
        for move in plan.moves:
            self._move(move)
        for new in plan.new:
            self._tokens[new.slot], self._tables[new.slot] = list(new.token_ids), list(new.block_table)
        drawn = []
        for row in plan.scheduled:
            self._tables[row.slot] += row.new_blocks
            state = self._compute(row.slot, row.start, row.start + row.count)
            if row.sample:
                drawn.append(model.drawn(state))
                self._tokens[row.slot].append(drawn[-1])
        return StepResult(tuple(drawn))

    def _compute(self, slot: int, start: int, end: int) -> int:
        size, memory, table, tokens = self._block_size, self._memory, self._tables[slot], self._tokens[slot]
        for block in table[: -(-end // size)]:
            hold = self._pool._state(block)
            if hold not in _READABLE:
                self._broken(f"a step uses block {block}, which is {hold.name if hold is not None else 'nobody’s'}")
        state = model.START
        for position in range(start):
            state = model.mix(state, memory[table[position // size], position % size])
        for position in range(start, end):
            entry = model.entry(state, tokens[position])
            memory[table[position // size], position % size] = entry
            state = model.mix(state, entry)
        return state

    def _move(self, move: Move) -> None:
        self.moved[move.kind] += 1
        if move.kind is MoveKind.SWAP_OUT:
            self._swapped[move.target] = bytes(self._memory.read(move.source))
        elif move.kind is MoveKind.SWAP_IN:
            self._memory.fill(move.target, memoryview(self._swapped[move.source]))
        else:
            self._memory.fill(move.target, memoryview(bytes(self._memory.read(move.source))))
