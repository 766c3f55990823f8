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

Blocks that another worker may read (OFFERED) or that a transfer may write (LANDING, QUARANTINED) are never taken
away here: they go when the command that ends the transfer says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.hashing import root_hash
from baton.ids import AttemptId, BlockIndex
from engine.batch import Batch, Step
from engine.block_pool import BlockPool, Hold
from engine.holdings import Holdings
from engine.messages import (
    Abort,
    AddRequest,
    Command,
    Commit,
    CommitPrefix,
    DropLanding,
    DropPrefix,
    Ended,
    EndReason,
    Event,
    FreeQuarantined,
    Lend,
    Lent,
    Load,
    MoveAway,
    Offered,
    ReleaseOffer,
    Reserved,
    Sealed,
    Task,
    Tokens,
)
from engine.pacing import Pace
from engine.plan import ScheduledSequence, StepPlan, StepResult
from engine.request import Phase, Request
from engine.swap import SwapPool


@dataclass(frozen=True)
class SchedulerLimits:
    block_size: int
    max_num_seqs: int
    """Slots: requests that run or receive at once."""
    max_num_batched_tokens: int
    """Tokens of one step."""
    max_model_len: int
    """Prompt and answer together; the pool holds at least so many."""
    eos_token_ids: frozenset[int]
    model_fingerprint: bytes


@dataclass
class SchedulerCounters:
    """Ever growing."""

    preemptions: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    stale_commands: int = 0
    """About requests that are over or never were: harmless."""


class Scheduler:
    def __init__(self, pool: BlockPool, limits: SchedulerLimits, swap: SwapPool | None = None) -> None:
        """Without a swap pool, what is preempted is computed again."""
        self.limits = limits
        self.counters = SchedulerCounters()
        self._pool = pool
        self._holdings = Holdings(pool, swap or SwapPool(0), limits.block_size)
        self._requests: dict[AttemptId, Request] = {}
        self._waiting: deque[Request] = deque()
        self._swapped: deque[Request] = deque()
        self._batch = Batch(limits.max_num_seqs)
        self._blocked: tuple[Request, int, bool] | None = None  # the head of the queue, and when it did not fit
        self._step = Step()  # being planned
        self._in_flight: deque[Step] = deque()
        self._pace: Pace | None = None
        self._events: list[Event] = []
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            AddRequest: self._on_add,
            Abort: self._on_abort,
            ReleaseOffer: self._on_release_offer,
            Commit: self._on_commit,
            DropLanding: self._on_drop_landing,
            FreeQuarantined: self._on_free_quarantined,
            CommitPrefix: self._on_commit_prefix,
            DropPrefix: self._on_drop_prefix,
            Lend: self._on_lend,
            MoveAway: self._on_move_away,
        }

    # --- the step

    def handle(self, command: Command) -> None:
        self._handlers[type(command)](command)

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
        while (queue := self._swapped or self._waiting) and (budget > 0 or self._receives(queue[0])):
            request = queue[0]
            if len(put_off) < self.limits.max_num_seqs and self._is_worth_waiting(request):
                put_off.append(queue.popleft())
                continue
            if not self._admit(request):
                break
            queue.popleft()
            if request.phase is Phase.RUNNING:
                budget = self._plan_prefill(request, budget, chunk_pace)
        self._waiting.extendleft(reversed(put_off))
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
            self._computed(request, row.start + row.count)
            if token_id is not None:
                request.num_drawing -= 1
                self._append(request, token_id)
        step.done()
        self._let_go()

    def drain_events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        events, self._events = self._events, []
        return [*events, *self._pool.drain_events()]

    def load(self) -> Load:
        return Load(
            running=len(self._batch.running),
            waiting=len(self._waiting) + len(self._swapped) + self._batch.num_receiving,
            swapped=len(self._swapped),
            queued_tokens=sum(r.num_unplanned for r in (*self._waiting, *self._batch.running)),
            blocks=self._pool.counts(),
        )

    def open_requests(self) -> list[AttemptId]:
        """All that have had no Ended yet."""
        return list(self._requests)

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
        self._stop_running(request, Phase.LEAVING)

    def _is_worth_swapping(self, request: Request) -> bool:
        pace, num_tokens = self._pace, request.num_planned
        if pace is None or not self._holdings.can_swap_out(request):
            return False
        num_blocks = -(-num_tokens // self.limits.block_size)
        return 2 * num_blocks * pace.swap_seconds < pace.cost.prefill_seconds(num_tokens)

    def _receives(self, request: Request) -> bool:
        """Whether another worker computes the request's prompt. Once preempted, it is computed here."""
        return request.task is Task.RECEIVE and request.num_cached is None

    def _is_worth_waiting(self, request: Request) -> bool:
        """Whether another prompt that is being computed has the very block that this one would begin with, behind what
        is cached: in a step or two it will be a hit."""
        if request.phase is not Phase.WAITING or self._receives(request) or self._batch.is_full:
            return False
        if self._blocked is not None and self._blocked[0] is request:
            return False  # it is not looked up in every step
        return self._holdings.is_coming(request, self._reusable_tokens(request))

    def _reusable_tokens(self, request: Request) -> int:
        """One token has to be computed to draw the next from, unless another worker draws it."""
        return len(request.tokens) - (0 if self._receives(request) else 1)

    def _admit(self, request: Request) -> bool:
        """Gives the head of the queue its blocks, and a slot if it can run. False: it stays, holding nothing."""
        if self._batch.is_full:
            return False
        receives = self._receives(request)
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
        first_time = request.num_cached is None
        if first_time:
            request.num_cached = min(request.num_planned, request.add.num_prompt_tokens)
            self.counters.prefix_queries += len(request.tokens)
            self.counters.prefix_hits += request.num_planned
        fetch_end = self._fetch_end(request)
        if receives or fetch_end > request.num_hit_blocks:
            if not receives:
                self._holdings.expect(request, fetch_end)
            request.phase = Phase.RECEIVING
            self._batch.num_receiving += 1
            blocks = self._holdings.refs(request)
            expected = blocks if receives else blocks[:fetch_end]
            self._events.append(Reserved(request.id, expected, request.num_hit_blocks))
            return True
        self._step.add_moves(request, moves)
        self._start(request)
        return True

    def _fetch_end(self, request: Request) -> int:
        """Up to which of its blocks it asks another worker. It does so once: what does not come is computed."""
        wanted = request.add.num_fetch_blocks if request.fetches else 0
        request.fetches = False
        return min(wanted, self._reusable_tokens(request) // self.limits.block_size)

    def _start(self, request: Request) -> None:
        """It has its blocks, and nobody else writes them."""
        self._batch.start(request)
        if request.task is Task.PREFILL:  # never preempted, so it starts once
            self._offer(request, len(request.blocks), len(request.tokens))

    def _offer(self, request: Request, num_blocks: int, num_tokens: int) -> None:
        self._holdings.offer(request, num_blocks)
        self._events.append(Offered(request.id, self._holdings.refs(request)[:num_blocks], num_tokens))
        if sealed := request.num_computed // self.limits.block_size:
            self._events.append(Sealed(request.id, sealed))

    def _stop_running(self, request: Request, phase: Phase) -> None:
        """What it holds goes now, or when the last step in flight that uses it is done."""
        self._batch.stop(request, phase)
        self._let_go()

    def _let_go(self) -> None:
        for request in self._batch.let_go():
            self._holdings.release(request)
            if request.phase is Phase.ENDED:
                self._holdings.forget_swapped(request)
            else:
                request.phase = Phase.SWAPPED if request.swapped else Phase.WAITING
                (self._swapped if request.swapped else self._waiting).appendleft(request)

    # --- progress

    def _computed(self, request: Request, num_tokens: int) -> None:
        self._holdings.computed(request, num_tokens)
        if request.task is Task.PREFILL:
            done = num_tokens == len(request.tokens)
            end = len(request.blocks) if done else num_tokens // self.limits.block_size
            self._events.append(Sealed(request.id, end))

    def _append(self, request: Request, token_id: int) -> None:
        index = request.num_generated
        request.tokens.append(token_id)
        self._events.append(Tokens(request.id, index, (token_id,), request.num_cached or 0))
        reason = self._end_reason(request, token_id)
        if reason is None and request.task is Task.PREFILL:
            reason = EndReason.PREFILLED
        if reason is not None:
            self._end(request, reason)

    def _end_reason(self, request: Request, token_id: int) -> EndReason | None:
        sampling = request.add.sampling
        if request.num_generated >= sampling.min_tokens:
            stops_model = token_id in self.limits.eos_token_ids and not sampling.ignore_eos
            if stops_model or token_id in sampling.stop_token_ids:
                return EndReason.STOP
        return EndReason.LENGTH if self._is_full(request, len(request.tokens)) else None

    def _is_full(self, request: Request, num_tokens: int) -> bool:
        at_most = request.add.sampling.max_tokens
        return num_tokens >= self.limits.max_model_len or (
            at_most is not None and num_tokens - request.add.num_prompt_tokens >= at_most
        )

    def _ends_in_flight(self, request: Request) -> bool:
        """Whether it will have ended when the steps in flight are done, whatever they draw."""
        return request.num_drawing > 0 and (
            request.task is Task.PREFILL or self._is_full(request, request.num_tokens)
        )  # fmt: skip

    def _end(self, request: Request, reason: EndReason, message: str = "") -> None:
        match request.phase:
            case Phase.RUNNING:
                self._stop_running(request, Phase.ENDED)
            case Phase.RECEIVING:
                self._batch.num_receiving -= 1
                self._holdings.release(request)
            case Phase.WAITING:
                self._waiting.remove(request)
            case Phase.SWAPPED:
                self._swapped.remove(request)
                self._holdings.forget_swapped(request)
        request.phase = Phase.ENDED  # one that is LEAVING already goes with its last step
        del self._requests[request.id]
        self._events.append(Ended(request.id, reason, message))

    # --- commands

    def _on_add(self, command: AddRequest) -> None:
        if command.id in self._requests:
            self.counters.stale_commands += 1  # a repeat
            return
        num_tokens, most = len(command.token_ids), self.limits.max_model_len - 1
        if not 0 < num_tokens <= most:
            message = f"{num_tokens} tokens do not fit: this worker takes 1 to {most} and adds at least one"
            self._events.append(Ended(command.id, EndReason.INVALID, message))
            return
        root = root_hash(self.limits.model_fingerprint, salt=command.cache_salt)
        request = Request(command, list(command.token_ids), root, fetches=command.num_fetch_blocks > 0)
        self._requests[command.id] = request
        self._waiting.append(request)

    def _on_abort(self, command: Abort) -> None:
        request = self._open(command.id)
        if request is None:
            return
        if request.phase is Phase.RECEIVING:
            self._holdings.drop_landing(request, in_flight=True)
        self._end(request, command.reason, command.message)

    def _on_release_offer(self, command: ReleaseOffer) -> None:
        if not self._holdings.end_offer(command.id):
            self.counters.stale_commands += 1

    def _on_commit(self, command: Commit) -> None:
        request = self._open(command.id, Phase.RECEIVING)
        if request is None:
            return
        self._holdings.commit(request, len(request.blocks), shareable=command.shareable)
        self._batch.num_receiving -= 1
        self._batch.start(request)
        self._append(request, command.first_token)

    def _on_drop_landing(self, command: DropLanding) -> None:
        request = self._open(command.id, Phase.RECEIVING)
        if request is None:
            return
        self._holdings.drop_landing(request, in_flight=command.in_flight)
        self._end(request, command.reason, command.message)

    def _on_free_quarantined(self, command: FreeQuarantined) -> None:
        if not self._holdings.end_quarantine(command.id):
            self.counters.stale_commands += 1

    def _on_commit_prefix(self, command: CommitPrefix) -> None:
        request = self._open(command.id, Phase.RECEIVING)
        if request is None:
            return
        num_blocks = max(command.num_blocks, request.num_hit_blocks)
        self._holdings.commit(request, num_blocks, shareable=command.shareable)
        request.num_cached = min(request.num_planned, request.add.num_prompt_tokens)
        self._batch.num_receiving -= 1
        self._start(request)

    def _on_drop_prefix(self, command: DropPrefix) -> None:
        request = self._open(command.id, Phase.RECEIVING)
        if request is None:
            return
        self._holdings.drop_landing(request, in_flight=True)
        self._holdings.release(request)
        self._batch.num_receiving -= 1
        request.num_cached, request.phase = None, Phase.WAITING
        self._waiting.appendleft(request)

    def _on_lend(self, command: Lend) -> None:
        self._events.append(Lent(command.id, self._holdings.lend(command.id, command.hashes)))

    def _on_move_away(self, command: MoveAway) -> None:
        request = self._open(command.id)
        if request is None:
            return
        if request.phase is Phase.RECEIVING:
            self._holdings.drop_landing(request, in_flight=True)
        full = request.num_computed // self.limits.block_size
        if not request.shareable:
            full = min(full, request.num_hit_blocks)  # whoever goes on would take the others for such as it computes
        if request.phase is Phase.RUNNING and full and not self._holdings.has_offer(request.id):
            self._offer(request, full, full * self.limits.block_size)
        self._end(request, EndReason.MOVED, "the worker is draining")

    def _open(self, request_id: AttemptId, phase: Phase | None = None) -> Request | None:
        """The request, if it has not ended and is in `phase`; else the command about it is counted as stale."""
        request = self._requests.get(request_id)
        if request is None or (phase is not None and request.phase is not phase):
            self.counters.stale_commands += 1
            return None
        return request


def _is_open_stream(request: Request) -> bool:
    """Whether somebody waits for its next token: the last token of a prompt is a decode to the runner alone."""
    return request.num_generated + request.num_drawing > 0 and request.task is not Task.PREFILL
