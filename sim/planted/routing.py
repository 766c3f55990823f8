"""Bugs of the router, and of what a worker does at its word."""

from __future__ import annotations

import asyncio
from typing import Any

from baton.v1 import worker_pb2
from router.attempt import Attempt
from router.session import WorkerSession
from router.session_attempts import SessionAttempts
from sim.planted.plant import Plant
from worker.core import WorkerCore

_ABORT_SECONDS = 5.0


def _cancel_in_turn(self: WorkerCore, cancel: worker_pb2.Cancel) -> None:
    loop: Any = asyncio.get_running_loop()
    begins = max(getattr(self, "free_at", 0.0), loop.time())
    self.free_at = begins + _ABORT_SECONDS  # type: ignore[attr-defined]  # the plant's own
    loop.call_at(begins, _cancel, self, cancel)


_cancel = WorkerCore._cancel


def _keep_all(self: SessionAttempts, lost: Any) -> None:
    """They are of the worker of that name, and it is back soon."""


def _greet_anybody(self: WorkerSession, first: worker_pb2.SessionResponse) -> None:
    first.hello.incarnation = self.peer.key.incarnation
    _greet(self, first)


_greet = WorkerSession._greet


def _open_without_deadline(self: Attempt, workers: Any, tokens: list[int], clock: Any, deadline: float) -> Any:
    if self.placement.prefill is None:
        return _open(self, workers, tokens, clock, deadline)
    return _open(self, workers, tokens, clock, clock.now() + 100_000.0)


_open = Attempt.open


def _submit_all_as_prompt(
    self: Attempt, workers: Any, side: Any, task: Any, tokens: list[int], remaining: float
) -> None:
    whole = _Prompt(self._request, tuple(tokens))
    request, self._request = self._request, whole  # type: ignore[assignment]
    try:
        _submit(self, workers, side, task, tokens, remaining)
    finally:
        self._request = request


class _Prompt:
    """A request whose answer so far is part of its prompt."""

    def __init__(self, request: Any, prompt_ids: tuple[int, ...]) -> None:
        self.prompt_ids = prompt_ids
        self.sampling = request.sampling
        self.cache_salt = request.cache_salt


_submit = Attempt._submit

PLANTS = (
    Plant(
        "abort-storm",
        "sglang#28651",
        "a worker takes seconds for each of many cancels, one behind the other",
        ((WorkerCore, "_cancel", _cancel_in_turn),),
    ),
    Plant(
        "stale-peer",
        "smg#2382",
        "a worker that is back under its address is taken for the one before, with the requests that it had",
        ((SessionAttempts, "lose_all", _keep_all), (WorkerSession, "_greet", _greet_anybody)),
    ),
    Plant(
        "no-timeout-on-two",
        "sglang#34457",
        "where two workers serve a request, nobody keeps its deadline",
        ((Attempt, "open", _open_without_deadline),),
    ),
    Plant(
        "resumed-as-prompt",
        "dynamo#7930",
        "a stream that goes on elsewhere takes what it has said for its prompt",
        ((Attempt, "_submit", _submit_all_as_prompt),),
    ),
)
