"""One request's life, from placement to its last chunk. Owns its attempts, its token log and its text.

    place ──► attempt ──► tokens… ──► finished
      ▲          │ a worker or the handoff was lost
      └──────────┘ attempt + 1: same seed, prompt and tokens so far

It never repeats a token, never skips one, and leaves no attempt open: not when it ends, fails, or is closed early
because the client went away.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from random import random

from baton.clock import Clock
from baton.config import RoutingConfig
from baton.errors import BatonError, DeadlineExceeded, HandoffFailed, PromptTooLong, Unavailable
from baton.ids import WorkerId
from baton.layout import KVLayout
from baton.metrics import RequestMetrics, RouterMetrics
from baton.v1 import transfer_pb2
from router.account import Account
from router.answer import Answer
from router.attempt import Attempt
from router.events import Side
from router.merge import TokenLog
from router.placement import Need, Placement, WorkerKey, place
from router.prepare import PreparedRequest
from router.request import Chunk, FinishReason
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import Tokenizer
from router.verdict import Fail, Finish, Retry, Verdict
from router.workers import Workers

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 16
_FIRST_EXCLUSION_SECONDS = 0.25
_MAX_EXCLUSION_SECONDS = 4.0


class Stream:
    def __init__(
        self,
        request: PreparedRequest,
        tokenizer: Tokenizer,
        workers: Workers,
        config: RoutingConfig,
        clock: Clock,
        metrics: tuple[RequestMetrics, RouterMetrics],
        *,
        arrived_at: float,
        deadline: float,
    ) -> None:
        self._request = request
        self._workers = workers
        self._config = config
        self._clock = clock
        self._deadline = deadline
        self._request_metrics, self._router_metrics = metrics
        self._account = Account(arrived_at, *metrics)
        self._log = TokenLog(request.max_tokens)
        self._answer = Answer(
            Detokenizer(tokenizer, request.prompt_ids),
            request.stop,
            request.end_ids,
            request.sampling.min_tokens,
        )
        self._excluded: dict[WorkerKey, float] = {}
        """Workers that failed this request, and until when they are left alone."""
        self._moved: transfer_pb2.Ticket | None = None
        """What the worker offered that the stream moves away from."""

    async def run(self) -> AsyncGenerator[Chunk, None]:
        self._request_metrics.prompt_tokens.inc(len(self._request.prompt_ids))
        for number in range(1, MAX_ATTEMPTS + 1):
            attempt = Attempt(self._request, number, await self._place(number), self._log, self._moved)
            self._moved = None
            try:
                tokens = [*self._request.prompt_ids, *self._log.known]
                verdict: Verdict | None = attempt.open(self._workers, tokens, self._clock, self._deadline)
                while verdict is None:
                    chunk, verdict = await self._advance(attempt)
                    if verdict is not None:
                        attempt.close()  # before the client takes what it gained: it may be slow
                    if chunk is not None:
                        yield chunk
            finally:
                attempt.close()
            if isinstance(verdict, Finish):
                return
            if isinstance(verdict, Fail):
                raise verdict.error
            over = self._over()
            if over is not None:
                yield self._last_chunk(attempt, Finish(over, verdict.blamed))
                return
            self._prepare_resume(attempt, verdict, number)
        raise Unavailable(f"gave up after {MAX_ATTEMPTS} attempts, which all lost a worker; try again later")

    # --- what arrives

    async def _advance(self, attempt: Attempt) -> tuple[Chunk | None, Verdict | None]:
        """The next chunk, if the answer gained something, and the verdict over the attempt, if there is one."""
        known = len(self._log)
        arrivals, verdict = await attempt.take()
        if verdict is None and self._is_to_move(attempt):
            attempt.move()
        new_tokens = self._log.known[known:]
        self._account.read(attempt, arrivals, len(new_tokens))
        gain = self._answer.push(new_tokens)
        self._request_metrics.generation_tokens.inc(len(gain.token_ids))
        if gain.stop_string:
            finish = Finish(FinishReason.STOP, Side.DECODE if attempt.state.decode_spoke else Side.PREFILL)
            return self._last_chunk(attempt, finish, gain.text, gain.token_ids, gain.stop_string), finish
        if isinstance(verdict, Finish):
            return self._last_chunk(attempt, verdict, gain.text, gain.token_ids), verdict
        if gain.token_ids:
            return Chunk(gain.text, gain.token_ids), verdict
        return None, verdict

    def _last_chunk(
        self,
        attempt: Attempt,
        finish: Finish,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        stop_string: str = "",
    ) -> Chunk:
        reason = finish.reason
        if not stop_string:
            held_back = self._answer.flush()
            text += held_back.text
            stop_string = held_back.stop_string
            reason = FinishReason.STOP if stop_string else reason
        finished = self._account.finish(
            reason,
            stop_string,
            attempt.worker(finish.side).id,
            len(self._request.prompt_ids),
            self._answer.num_tokens,
        )
        return Chunk(text, token_ids, finished)

    # --- what goes wrong

    def _over(self) -> FinishReason | None:
        """Whether the tokens that arrived before a loss were all there would have been: only the word was lost."""
        count = len(self._log)
        if count > self._request.sampling.min_tokens and self._log.known[-1] in self._request.end_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if count == self._request.max_tokens else None

    def _prepare_resume(self, attempt: Attempt, retry: Retry, number: int) -> None:
        self._log.drop_held_back()
        self._moved = retry.ticket
        if retry.moved:
            self._router_metrics.requests_moved.inc()
            _log.info("attempt %s moves away from %s", attempt.id, attempt.worker(retry.blamed).id)
            return
        self._account.resumes += 1
        self._router_metrics.requests_resumed.inc()
        blamed = attempt.worker(retry.blamed)
        seconds = min(_FIRST_EXCLUSION_SECONDS * 2 ** (number - 1), _MAX_EXCLUSION_SECONDS)
        self._excluded[blamed] = self._clock.now() + seconds
        _log.warning(
            "attempt %s failed after %d tokens: %s; going on without %s",
            attempt.id,
            len(self._log),
            retry.message,
            blamed.id,
        )

    # --- where it goes

    async def _place(self, number: int) -> Placement:
        """Waits for workers as long as the deadline and resume_timeout allow. Raises when nobody comes."""
        give_up = min(self._deadline, self._clock.now() + self._config.resume_timeout_seconds)
        while True:
            tried_at = self._clock.now()
            if tried_at >= self._deadline:
                raise self._nobody()
            placement = await self._try_place(tried_at)
            if placement is not None:
                self._note(placement, number)
                return placement
            self._refuse_if_never(number)
            now = self._clock.now()
            if now >= give_up:
                raise self._nobody()
            # Of all that were left out of this try: an exclusion may have run out while it looked around.
            pauses = [max(until - now, 0.0) for until in self._excluded.values() if until > tried_at]
            await self._workers.wait_change(min([give_up - now, *pauses]))

    def _is_to_move(self, attempt: Attempt) -> bool:
        """Whether its decode worker drains, and another could go on with it now."""
        session = self._workers.session(attempt.placement.decode)
        if session is None or not session.draining:
            return False
        return place(self._workers.candidates({}), self._need(self._clock.now())) is not None

    async def _try_place(self, now: float) -> Placement | None:
        if self._workers.missing():
            return None
        cached = await self._cached_blocks()
        self._refuse_other_model()
        return place(self._workers.candidates(cached), self._need(now), tie_breaker=lambda key: random())

    def _need(self, now: float) -> Need:
        return Need(
            num_tokens=len(self._request.prompt_ids) + len(self._log),
            local_prefill_tokens=self._config.local_prefill_tokens,
            fetch_prefix_tokens=self._config.fetch_prefix_tokens,
            offered_blocks=0 if self._moved is None else len(self._moved.blocks),
            offered_layout=self._moved_layout(),
            excluded=frozenset(key for key, until in self._excluded.items() if until > now),
        )

    def _moved_layout(self) -> KVLayout | None:
        """None where nothing came along, or nothing that can be understood."""
        if self._moved is None:
            return None
        try:
            return KVLayout.from_proto(self._moved.layout, self._moved.layout_fingerprint)
        except HandoffFailed:
            return None

    async def _cached_blocks(self) -> dict[WorkerId, int]:
        """Of the prompt, from its beginning on: how many blocks of its own size each worker is said to hold."""
        cached: dict[WorkerId, int] = {}
        for block_size, workers in self._workers.ready_by_block_size().items():
            hashes = await self._request.prompt_hashes.of(block_size)
            cached |= await self._workers.directory.longest_prefix(hashes, workers)
        return cached

    def _refuse_other_model(self) -> None:
        """Another model would take the tokens, and go on with an answer of its own."""
        served = self._workers.model
        difference = "" if served is None else self._request.model.difference(served)
        if difference:
            done = f" after {len(self._log)} tokens" if len(self._log) else ""
            raise Unavailable(f"the model was replaced{done} by another of its name; ask again from the start")

    def _refuse_if_never(self, number: int) -> None:
        length = len(self._request.prompt_ids) + len(self._log)
        limit = self._workers.max_prompt_len()
        if 0 < limit < length and number == 1:
            raise PromptTooLong(
                f"prompt has {length} tokens; the KV pool of the largest worker holds a prompt of at most {limit}",
                param="prompt",
            )

    def _nobody(self) -> BatonError:
        done = f"after {len(self._log)} tokens"
        missing = self._workers.missing()
        if self._clock.now() >= self._deadline:
            return DeadlineExceeded(f"the deadline passed {done}" + (f": {missing}" if missing else ""))
        waited = self._config.resume_timeout_seconds
        return Unavailable(f"waited {waited:g} s {done} for a worker: {missing or 'none that is ready can take it on'}")

    def _note(self, placement: Placement, number: int) -> None:
        self._router_metrics.placements.labels(way=placement.way.value).inc()
        if number == 1:
            self._router_metrics.predicted_cached_tokens.inc(placement.cached_tokens)
        _log.info("attempt %s#%d: %s", self._request.name, number, placement)
