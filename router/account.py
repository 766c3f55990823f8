"""One request's account: usage, timings, who served it, and the metrics of it. Reads what happened, changes nothing."""

from __future__ import annotations

from baton.metrics import RequestMetrics, RouterMetrics
from router.attempt import Attempt
from router.events import Arrival, Landed, Side, Tokens
from router.request import Finished, FinishReason, Timings, Usage


class Account:
    def __init__(self, arrived_at: float, metrics: RequestMetrics, router_metrics: RouterMetrics) -> None:
        self._arrived_at = arrived_at
        self._metrics = metrics
        self._router_metrics = router_metrics
        self._first_at: float | None = None
        self._last_at = arrived_at
        self._prefill_seconds = 0.0
        self._prefill_worker = ""
        self._first_attempt: Attempt | None = None
        self._transfer = Landed(0.0, 0, 0, "")
        self.resumes = 0

    def read(self, attempt: Attempt, arrivals: list[Arrival], num_new_tokens: int) -> None:
        """Of a batch of arrivals, of which the answer gained `num_new_tokens`."""
        for arrival in arrivals:
            if isinstance(arrival.event, Landed):
                self._add_transfer(arrival.event)
            elif isinstance(arrival.event, Tokens) and self._first_attempt is None:
                self._read_first(attempt, arrival)
        if num_new_tokens:
            self._observe_gaps(arrivals[-1].at, num_new_tokens)

    def _read_first(self, attempt: Attempt, arrival: Arrival) -> None:
        self._first_attempt = attempt
        self._prefill_worker = attempt.worker(Side.PREFILL).id
        self._prefill_seconds = arrival.at - attempt.opened_at
        self._first_at = self._last_at = arrival.at
        self._metrics.time_to_first_token.observe(arrival.at - self._arrived_at)

    def _observe_gaps(self, at: float, num_tokens: int) -> None:
        gap = max(at - self._last_at, 0.0)
        if gap or at != self._first_at:
            for _ in range(num_tokens):
                self._metrics.inter_token_latency.observe(gap / num_tokens)
        self._last_at = at

    def _add_transfer(self, landed: Landed) -> None:
        known = self._transfer
        self._transfer = Landed(
            known.seconds + landed.seconds,
            known.blocks + landed.blocks,
            known.bytes + landed.bytes,
            landed.transport or known.transport,
        )

    def finish(
        self, reason: FinishReason, stop_string: str, last_worker: str, num_prompt: int, num_answer: int
    ) -> Finished:
        cached = self._first_attempt.state.cached_tokens if self._first_attempt is not None else 0
        cached = min(cached, num_prompt)
        total = self._last_at - self._arrived_at
        self._observe_end(reason, num_prompt, num_answer, cached, total)
        return Finished(
            reason=reason,
            usage=Usage(num_prompt, cached, num_answer),
            prefill_worker=self._prefill_worker,
            decode_worker=last_worker,
            timings=Timings(
                first_token_seconds=(self._first_at or self._last_at) - self._arrived_at,
                total_seconds=total,
                prefill_seconds=self._prefill_seconds,
                transfer_seconds=self._transfer.seconds,
                transfer_blocks=self._transfer.blocks,
                transfer_bytes=self._transfer.bytes,
                transport=self._transfer.transport,
                resumes=self.resumes,
            ),
            stop_string=stop_string,
        )

    def _observe_end(self, reason: FinishReason, num_prompt: int, num_answer: int, cached: int, total: float) -> None:
        self._metrics.e2e_request_latency.observe(total)
        self._metrics.request_prompt_tokens.observe(num_prompt)
        self._metrics.request_generation_tokens.observe(num_answer)
        self._metrics.ended(reason.value)
        self._router_metrics.actual_cached_tokens.inc(cached)
