"""Who is in the batch: slots, and what the steps that are planned or in flight use. Pure bookkeeping.

A slot is a row of the runner's arrays. It is given out again when no step in flight uses it any more.
"""

from __future__ import annotations

from engine.plan import Move, NewSequence, ScheduledSequence, StepPlan
from engine.request import Phase, Request
from engine.step_cost import StepShape


class Step:
    """One that is being planned or in flight."""

    def __init__(self) -> None:
        self.rows: list[tuple[Request, ScheduledSequence]] = []
        self.moves: list[Move] = []
        self.users: dict[Request, None] = {}
        """Requests whose slot or blocks it uses, in order."""

    @property
    def shape(self) -> StepShape:
        return StepShape.of(row for _, row in self.rows)

    def add_row(self, request: Request, row: ScheduledSequence) -> None:
        self._uses(request)
        self.rows.append((request, row))
        request.num_planned += row.count
        request.num_drawing += row.sample

    def add_moves(self, request: Request, moves: tuple[Move, ...]) -> None:
        if moves:
            self._uses(request)
            self.moves += moves

    def done(self) -> None:
        for request in self.users:
            request.steps_in_flight -= 1

    def _uses(self, request: Request) -> None:
        if request not in self.users:
            self.users[request] = None
            request.steps_in_flight += 1


class Batch:
    def __init__(self, max_num_seqs: int) -> None:
        self._most = max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._leaving: list[Request] = []
        self._new: list[Request] = []  # the runner does not know their slots yet
        self.running: list[Request] = []
        """The longest in the batch first."""
        self.num_receiving = 0
        """Those that will get a slot when their blocks have landed."""

    @property
    def is_full(self) -> bool:
        return len(self.running) + len(self._leaving) + self.num_receiving >= self._most

    @property
    def is_empty(self) -> bool:
        return not self.running and not self._leaving and not self.num_receiving

    @property
    def awaits_leaving(self) -> bool:
        """Slots and blocks will be free when the steps in flight are done."""
        return bool(self._leaving)

    def is_new(self, request: Request) -> bool:
        return request in self._new

    def start(self, request: Request) -> None:
        request.phase = Phase.RUNNING
        request.slot = self._free_slots.pop()
        self.running.append(request)
        self._new.append(request)

    def stop(self, request: Request, phase: Phase) -> None:
        """It runs no more; `let_go` gives it back once no step in flight uses what it holds."""
        self.running.remove(request)
        if request in self._new:
            self._new.remove(request)
        request.phase = phase
        self._leaving.append(request)

    def let_go(self) -> list[Request]:
        """Those that have left for good, in the order in which they were stopped."""
        gone = [request for request in self._leaving if not request.steps_in_flight]
        for request in gone:
            self._leaving.remove(request)
            self._free_slots.append(request.slot)
        return gone

    def plan(self, step: Step) -> StepPlan:
        """Of a step that is done being planned. New sequences go with the first plan that is not empty."""
        plan = StepPlan(
            tuple(map(_new_sequence, self._new)), tuple(row for _, row in step.rows), tuple(step.moves)
        )  # fmt: skip
        if not plan.is_empty:
            self._new = []
        return plan


def _new_sequence(request: Request) -> NewSequence:
    return NewSequence(
        slot=request.slot,
        token_ids=tuple(request.tokens),
        num_prompt_tokens=request.add.num_prompt_tokens,
        block_table=tuple(request.blocks),
        sampling=request.add.sampling,
    )
