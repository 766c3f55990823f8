"""Owns the open requests: where each waits or runs, what is done about it, and what is told.

Commands come in, events go out; in between the scheduler moves requests from the queues into steps and back. Every way
from one phase to another (engine/request.py) is here, and with it what the request holds.

Blocks that another worker may read (OFFERED) or that a transfer may write (LANDING, QUARANTINED) are never taken
away here: they go when the command that ends the transfer says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from baton.hashing import root_hash
from baton.ids import AttemptId
from engine.batch import Batch
from engine.holdings import Holdings
from engine.limits import SchedulerCounters, SchedulerLimits
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
    MoveAway,
    Offered,
    ReleaseOffer,
    Reserved,
    Sealed,
    Task,
    Tokens,
)
from engine.request import Phase, Request


class Requests:
    def __init__(self, limits: SchedulerLimits, holdings: Holdings) -> None:
        self.counters = SchedulerCounters()
        self.batch = Batch(limits.max_num_seqs)
        self.waiting: deque[Request] = deque()
        self.swapped: deque[Request] = deque()
        self._limits = limits
        self._holdings = holdings
        self._open: dict[AttemptId, Request] = {}
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

    def handle(self, command: Command) -> None:
        self._handlers[type(command)](command)

    def drain_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def open_ids(self) -> list[AttemptId]:
        """Of all that have had no Ended yet."""
        return list(self._open)

    def receives(self, request: Request) -> bool:
        """Whether another worker computes the request's prompt. Once preempted, it is computed here."""
        return request.task is Task.RECEIVE and request.num_cached is None

    # --- into the batch and out of it

    def admit(self, request: Request) -> None:
        """It has its blocks: it runs, or waits for what others are to write into some of them."""
        receives = self.receives(request)
        if request.num_cached is None:
            request.num_cached = min(request.num_planned, request.add.num_prompt_tokens)
            self.counters.prefix_queries += len(request.tokens)
            self.counters.prefix_hits += request.num_planned
        fetch_end = self._fetch_end(request)
        if receives:
            self._receive(request, len(request.blocks))
        elif fetch_end > request.num_hit_blocks:
            self._holdings.expect(request, fetch_end)
            self._receive(request, fetch_end)
        else:
            self._start(request)

    def _fetch_end(self, request: Request) -> int:
        """Up to which of its blocks it asks another worker. It does so once: what does not come is computed. Of its
        last token it computes the KV itself, to draw the next."""
        wanted = request.add.num_fetch_blocks if request.fetches else 0
        request.fetches = False
        return min(wanted, (len(request.tokens) - 1) // self._limits.block_size)

    def _receive(self, request: Request, num_blocks: int) -> None:
        """The first so many of its blocks are asked for."""
        request.phase = Phase.RECEIVING
        self.batch.num_receiving += 1
        self._events.append(Reserved(request.id, self._holdings.refs(request)[:num_blocks], request.num_hit_blocks))

    def _start(self, request: Request) -> None:
        """Nobody else writes its blocks."""
        self.batch.start(request)
        if request.task is Task.PREFILL:  # never preempted, so it starts once
            self._offer(request, len(request.blocks), len(request.tokens))

    def _offer(self, request: Request, num_blocks: int, num_tokens: int) -> None:
        self._holdings.offer(request, num_blocks)
        self._events.append(Offered(request.id, self._holdings.refs(request)[:num_blocks], num_tokens))
        if sealed := request.num_computed // self._limits.block_size:
            self._events.append(Sealed(request.id, sealed))

    def stop_running(self, request: Request, phase: Phase) -> None:
        """What it holds goes now, or when the last step in flight that uses it is done."""
        self.batch.stop(request, phase)
        self.let_go()

    def let_go(self) -> None:
        """Of what those hold that no step in flight uses any more."""
        for request in self.batch.let_go():
            self._holdings.release(request)
            if request.phase is Phase.ENDED:
                self._holdings.forget_swapped(request)
            else:
                request.phase = Phase.SWAPPED if request.swapped else Phase.WAITING
                (self.swapped if request.swapped else self.waiting).appendleft(request)

    # --- progress

    def computed(self, request: Request, num_tokens: int) -> None:
        """The KV of its first `num_tokens` tokens is there."""
        self._holdings.computed(request, num_tokens)
        if request.task is Task.PREFILL:
            done = num_tokens == len(request.tokens)
            end = len(request.blocks) if done else num_tokens // self._limits.block_size
            self._events.append(Sealed(request.id, end))

    def append(self, request: Request, token_id: int) -> None:
        """It has drawn its next token, which may be its last."""
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
            stops_model = token_id in self._limits.eos_token_ids and not sampling.ignore_eos
            if stops_model or token_id in sampling.stop_token_ids:
                return EndReason.STOP
        return EndReason.LENGTH if len(request.tokens) >= request.most_tokens else None

    def _end(self, request: Request, reason: EndReason, message: str = "") -> None:
        match request.phase:
            case Phase.RUNNING:
                self.stop_running(request, Phase.ENDED)
            case Phase.RECEIVING:
                self.batch.num_receiving -= 1
                self._holdings.release(request)
            case Phase.WAITING:
                self.waiting.remove(request)
            case Phase.SWAPPED:
                self.swapped.remove(request)
                self._holdings.forget_swapped(request)
        request.phase = Phase.ENDED  # one that is LEAVING already goes with its last step
        del self._open[request.id]
        self._events.append(Ended(request.id, reason, message))

    # --- commands

    def _on_add(self, command: AddRequest) -> None:
        if command.id in self._open:
            self.counters.stale_commands += 1  # a repeat
            return
        num_tokens, most = len(command.token_ids), self._limits.max_model_len - 1
        if not 0 < num_tokens <= most:
            message = f"{num_tokens} tokens do not fit: this worker takes 1 to {most} and adds at least one"
            self._events.append(Ended(command.id, EndReason.INVALID, message))
            return
        root = root_hash(self._limits.model_fingerprint, salt=command.cache_salt)
        request = Request(
            command, list(command.token_ids), root, self._most_tokens(command), fetches=command.num_fetch_blocks > 0
        )
        self._open[command.id] = request
        self.waiting.append(request)

    def _most_tokens(self, command: AddRequest) -> int:
        most, max_tokens = self._limits.max_model_len, command.sampling.max_tokens
        return most if max_tokens is None else min(most, command.num_prompt_tokens + max_tokens)

    def _on_abort(self, command: Abort) -> None:
        request = self._find(command.id)
        if request is None:
            return
        if request.phase is Phase.RECEIVING:
            self._holdings.drop_landing(request, in_flight=True)
        self._end(request, command.reason, command.message)

    def _on_release_offer(self, command: ReleaseOffer) -> None:
        if not self._holdings.end_offer(command.id):
            self.counters.stale_commands += 1

    def _on_commit(self, command: Commit) -> None:
        request = self._find(command.id, Phase.RECEIVING)
        if request is None:
            return
        self._holdings.commit(request, len(request.blocks), shareable=command.shareable)
        self.batch.num_receiving -= 1
        self.batch.start(request)
        self.append(request, command.first_token)

    def _on_drop_landing(self, command: DropLanding) -> None:
        request = self._find(command.id, Phase.RECEIVING)
        if request is None:
            return
        self._holdings.drop_landing(request, in_flight=command.in_flight)
        self._end(request, command.reason, command.message)

    def _on_free_quarantined(self, command: FreeQuarantined) -> None:
        if not self._holdings.end_quarantine(command.id):
            self.counters.stale_commands += 1

    def _on_commit_prefix(self, command: CommitPrefix) -> None:
        request = self._find(command.id, Phase.RECEIVING)
        if request is None:
            return
        num_blocks = max(command.num_blocks, request.num_hit_blocks)
        self._holdings.commit(request, num_blocks, shareable=command.shareable)
        request.num_cached = min(request.num_planned, request.add.num_prompt_tokens)
        self.batch.num_receiving -= 1
        self._start(request)

    def _on_drop_prefix(self, command: DropPrefix) -> None:
        request = self._find(command.id, Phase.RECEIVING)
        if request is None:
            return
        self._holdings.drop_landing(request, in_flight=True)
        self._holdings.release(request)
        self.batch.num_receiving -= 1
        request.num_cached, request.phase = None, Phase.WAITING
        self.waiting.appendleft(request)

    def _on_lend(self, command: Lend) -> None:
        self._events.append(Lent(command.id, self._holdings.lend(command.id, command.hashes)))

    def _on_move_away(self, command: MoveAway) -> None:
        request = self._find(command.id)
        if request is None:
            return
        if request.phase is Phase.RECEIVING:
            self._holdings.drop_landing(request, in_flight=True)
        full = request.num_computed // self._limits.block_size
        if not request.shareable:
            full = min(full, request.num_hit_blocks)  # whoever goes on would take the others for such as it computes
        if request.phase is Phase.RUNNING and full and not self._holdings.has_offer(request.id):
            self._offer(request, full, full * self._limits.block_size)
        self._end(request, EndReason.MOVED, "the worker is draining")

    def _find(self, request_id: AttemptId, phase: Phase | None = None) -> Request | None:
        """The request, if it has not ended and is in `phase`; else the command about it is counted as stale."""
        request = self._open.get(request_id)
        if request is None or (phase is not None and request.phase is not phase):
            self.counters.stale_commands += 1
            return None
        return request
