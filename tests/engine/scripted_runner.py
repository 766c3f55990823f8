"""A runner without a model: the token it draws depends on every KV entry that it was made to read.

KV entries are remembered by (block, offset); reading one that was never written in the block's present use raises. So
a wrong block table, a missing chunk or a block freed too early shows as an error or a wrong token.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from baton.ids import BlockIndex
from engine.plan import Move, MoveKind, NewSequence, StepPlan, StepResult

VOCAB = 50


def next_token(tokens: list[int]) -> int:
    """The scripted model: depends on all tokens."""
    return int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:4], "little") % VOCAB


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class ScriptedRunner:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[BlockIndex, dict[int, int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[BlockIndex]] = {}
        self.swapped: dict[int, dict[int, int]] = {}
        self.moves: Counter[MoveKind] = Counter()
        self.steps = 0
        self.computed_tokens = 0
        self.largest_step = 0

    def on_take(self, block: BlockIndex) -> None:
        self.kv[block] = {}

    def run(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        self.computed_tokens += plan.num_tokens
        self.largest_step = max(self.largest_step, plan.num_tokens)
        for move in plan.moves:
            self._move(move)
        for new in plan.new:
            self._fill(new)
        slots = [s.slot for s in plan.scheduled]
        assert len(set(slots)) == len(slots), "a slot is scheduled twice"
        drawn = []
        for row in plan.scheduled:
            tokens, table = self.tokens[row.slot], self.tables[row.slot]
            table += row.new_blocks
            for position in range(row.start, row.start + row.count):
                self.kv[table[position // self.block_size]][position % self.block_size] = tokens[position]
            if row.sample:
                end = row.start + row.count
                assert end == len(tokens), "drawn before all known tokens are computed"
                read = [self.kv[table[p // self.block_size]][p % self.block_size] for p in range(end)]
                tokens.append(next_token(read))
                drawn.append(tokens[-1])
        return StepResult(tuple(drawn))

    def _move(self, move: Move) -> None:
        source = self.swapped[move.source] if move.kind is MoveKind.SWAP_IN else self.kv[BlockIndex(move.source)]
        if move.kind is MoveKind.SWAP_OUT:
            self.swapped[move.target] = dict(source)
        else:
            self.kv[BlockIndex(move.target)] = dict(source)
        self.moves[move.kind] += 1

    def _fill(self, new: NewSequence) -> None:
        self.tokens[new.slot] = list(new.token_ids)
        self.tables[new.slot] = list(new.block_table)
