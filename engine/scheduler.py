"""Decides what each step computes. Pure: no torch, no clock, no network; the same commands give the same plans.

A step's plan mixes decodes and prefill chunks: decodes first, one token each, then prefills with what is left of the
token budget, then requests that were swapped out, then new ones, first come first served. While a stream is open in
the step, the pace (pacing.py) limits how many tokens of prompts ride along; with none open, prompts take the whole
budget. A request gets blocks for all tokens it knows when it is admitted, so only decodes grow; where one cannot, the
youngest running request is preempted: its blocks go, its tokens stay. Its KV is swapped out to host memory where there
is room and where that costs less than to compute it again.

A step may be planned while the one before it runs: each request that draws a token there is planned as if the token
were known, and where it ends the request, what was planned for it is thrown away. Steps run in order, so a later step
may use what an earlier one computes; but what a step in flight uses (slots, blocks, swap slots) is given to nobody
until it is done, for transfers do not wait for steps.

Whose turn it is is decided here; where each request stands, and what its coming and going does, is in requests.py.
"""

from __future__ import annotations

from collections import deque

from baton.ids import AttemptId, BlockIndex
from engine.batch import Step
from engine.block_pool import BlockPool, Hold
from engine.holdings import Holdings
from engine.limits import SchedulerCounters, SchedulerLimits
from engine.messages import Command, Event, Load, Task
from engine.pacing import Pace
from engine.plan import ScheduledSequence, StepPlan, StepResult
from engine.request import Phase, Request
from engine.requests import Requests
from engine.swap import SwapPool


class Scheduler:
    def __init__(self, pool: BlockPool, limits: SchedulerLimits, swap: SwapPool | None = None) -> None:
        """Without a swap pool, what is preempted is computed again."""
        self.limits = limits
        self._pool = pool
        self._holdings = Holdings(pool, swap or SwapPool(0), limits.block_size)
        self._requests = Requests(limits, self._holdings)
        self._batch = self._requests.batch
        self._blocked: tuple[Request, int, bool] | None = None  # the head of the queue, and when it did not fit
        self._step = Step()  # being planned
        self._in_flight: deque[Step] = deque()
        self._pace: Pace | None = None

    @property
    def counters(self) -> SchedulerCounters:
        return self._requests.counters

    # --- the step

    def handle(self, command: Command) -> None:
        self._requests.handle(command)

    def schedule(self, pace: Pace | None = None) -> StepPlan:
        """The next step; empty when there is nothing to do. Of each that is not empty the result has to come to
        `apply`, in order; before it does, the next one may be planned. Without a pace, only the token budget limits
        chunks, and nothing is swapped out."""
        self._step, self._pace = Step(), pace
        budget = self.limits.max_num_batched_tokens
        for request in [r for r in self._batch.running if r.num_unplanned == 1 and not self._ends_in_flight(r)]:
            if request.phase is Phase.RUNNING and budget > 0:  # it may have been preempted for an older one
                budget -= self._plan_decode(request)
        chunk_pace = pace if any(_is_open_stream(request) for request, _ in self._step.rows) else None
        for request in [r for r in self._batch.running if r.num_unplanned > 1]:
            budget = self._plan_prefill(request, budget, chunk_pace)
        put_off: list[Request] = []
        requests = self._requests
        while (queue := requests.swapped or requests.waiting) and (budget > 0 or requests.receives(queue[0])):
            request = queue[0]
            if len(put_off) < self.limits.max_num_seqs and self._is_worth_waiting(request):
                put_off.append(queue.popleft())
                continue
            if not self._admit(request):
                break
            queue.popleft()
            if request.phase is Phase.RUNNING:
                budget = self._plan_prefill(request, budget, chunk_pace)
        requests.waiting.extendleft(reversed(put_off))
        plan = self._batch.plan(self._step)
        if not plan.is_empty:
            self._in_flight.append(self._step)
        return plan

    def apply(self, result: StepResult) -> None:
        """Takes in what the oldest step in flight drew."""
        step = self._in_flight.popleft()
        self._holdings.moved(step.moves)
        drawn = iter(result.token_ids)
        for request, row in step.rows:
            token_id = next(drawn) if row.sample else None
            if request.phase is Phase.ENDED:
                continue  # while the step was in flight
            self._requests.computed(request, row.start + row.count)
            if token_id is not None:
                request.num_drawing -= 1
                self._requests.append(request, token_id)
        step.done()
        self._requests.let_go()

    def drain_events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        return [*self._requests.drain_events(), *self._pool.drain_events()]

    def load(self) -> Load:
        requests, batch = self._requests, self._batch
        return Load(
            running=len(batch.running),
            waiting=len(requests.waiting) + len(requests.swapped) + batch.num_receiving,
            swapped=len(requests.swapped),
            queued_tokens=sum(r.num_unplanned for r in (*requests.waiting, *batch.running)),
            blocks=self._pool.counts(),
        )

    def open_requests(self) -> list[AttemptId]:
        """All that have had no Ended yet."""
        return self._requests.open_ids()

    # --- planning

    def _plan_decode(self, request: Request) -> int:
        new_blocks = self._holdings.grow(request)
        while new_blocks is None:
            if self._batch.awaits_leaving:
                return 0  # what those hold comes free when the steps in flight are done
            victim = self._youngest_preemptible() or request
            self._preempt(victim)
            if victim is request:
                return 0
            new_blocks = self._holdings.grow(request)
        return self._plan(request, 1, new_blocks)

    def _plan_prefill(self, request: Request, budget: int, pace: Pace | None) -> int:
        """What is left of the budget: nothing behind a prompt that could not be computed whole."""
        count = min(request.num_unplanned, budget)
        if pace is not None:
            count = pace.chunk(self._step.shape, request.num_planned, count)
        whole = count == request.num_unplanned
        if count > 0:
            self._plan(request, count, ())
        return budget - count if whole else 0

    def _plan(self, request: Request, count: int, new_blocks: tuple[BlockIndex, ...]) -> int:
        sample = count == request.num_unplanned
        if self._batch.is_new(request):
            new_blocks = ()  # its block table goes to the runner whole
        self._step.add_row(request, ScheduledSequence(request.slot, request.num_planned, count, new_blocks, sample))
        return count

    def _youngest_preemptible(self) -> Request | None:
        for request in reversed(self._batch.running):
            if request.task is not Task.PREFILL and request not in self._step.users:
                return request
        return None

    def _preempt(self, request: Request) -> None:
        self.counters.preemptions += 1
        if self._is_worth_swapping(request):
            self._step.add_moves(request, self._holdings.swap_out(request))
        self._requests.stop_running(request, Phase.LEAVING)

    def _is_worth_swapping(self, request: Request) -> bool:
        pace, num_tokens = self._pace, request.num_planned
        if pace is None or not self._holdings.can_swap_out(request):
            return False
        num_blocks = -(-num_tokens // self.limits.block_size)
        return 2 * num_blocks * pace.swap_seconds < pace.cost.prefill_seconds(num_tokens)

    def _is_worth_waiting(self, request: Request) -> bool:
        """Whether another prompt that is being computed has the very block that this one would begin with, behind what
        is cached: in a step or two it will be a hit."""
        if request.phase is not Phase.WAITING or self._requests.receives(request) or self._batch.is_full:
            return False
        if self._blocked is not None and self._blocked[0] is request:
            return False  # it is not looked up in every step
        return self._holdings.is_coming(request, self._reusable_tokens(request))

    def _reusable_tokens(self, request: Request) -> int:
        """One token has to be computed to draw the next from, unless another worker draws it."""
        return len(request.tokens) - (0 if self._requests.receives(request) else 1)

    def _admit(self, request: Request) -> bool:
        """Gives the head of the queue its blocks, and a slot if it can run. False: it stays, holding nothing."""
        if self._batch.is_full:
            return False
        receives = self._requests.receives(request)
        idle = self._batch.is_empty
        if self._blocked == (request, self._pool.available, idle):
            return False  # nothing has changed: a long prompt need not be looked up again in every step
        moves = self._holdings.reserve(
            request,
            hold=Hold.LANDING if receives else Hold.ACTIVE,
            reusable_tokens=self._reusable_tokens(request),
            # What starts without room to grow would be preempted at once.
            growth=0 if request.task is Task.PREFILL or idle else 1,
        )
        if moves is None:
            self._blocked = (request, self._pool.available, idle)
            return False
        self._step.add_moves(request, moves)
        self._requests.admit(request)
        return True

    def _ends_in_flight(self, request: Request) -> bool:
        """Whether it will have ended when the steps in flight are done, whatever they draw."""
        return request.num_drawing > 0 and (request.task is Task.PREFILL or request.num_tokens >= request.most_tokens)


def _is_open_stream(request: Request) -> bool:
    """Whether somebody waits for its next token: the last token of a prompt is a decode to the runner alone."""
    return request.num_generated + request.num_drawing > 0 and request.task is not Task.PREFILL
