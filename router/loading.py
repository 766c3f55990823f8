"""Gets the served model's tokenizer, before the first request needs it. Owns the load and its retries, no request.

A tokenizer belongs to one model at one source: where the workers come to serve another, it is loaded anew. The one
before lives on with the requests that still use it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from baton.errors import BatonError, CheckpointError
from router.text.tokenizer import Tokenizer
from router.workers import Workers

_log = logging.getLogger(__name__)

_RELOAD_SECONDS = 5.0


class _Origin(NamedTuple):
    source: str
    model_fingerprint: bytes


class TokenizerLoader:
    """`source` is where the tokenizer is; empty: where the workers say."""

    def __init__(self, workers: Workers, source: str, load: Callable[[str], Tokenizer]) -> None:
        self._workers = workers
        self._source = source
        self._load = load
        self._origin: _Origin | None = None
        """Of what `_loading` loads."""
        self._loading: asyncio.Task[Tokenizer] | None = None
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Loads as soon as it is known where from, so that no request waits for it."""
        self._keeping = asyncio.create_task(self._keep(), name="load tokenizer")

    async def get(self) -> Tokenizer:
        """Waits for it. Raises CheckpointError, or whatever else the load failed with."""
        wanted = self._wanted()
        if wanted is None or not wanted.source:
            raise CheckpointError(
                "no tokenizer: the workers name no directory or hub id; give the router one by --model"
            )
        if self._loading is None or self._origin != wanted or _failed(self._loading):
            self._origin = wanted
            self._loading = asyncio.create_task(asyncio.to_thread(self._load, wanted.source))
        return await asyncio.shield(self._loading)

    def loaded(self) -> Tokenizer | None:
        """None while it is being loaded, or could not be."""
        if self._loading is None or self._origin != self._wanted() or not self._loading.done():
            return None
        return None if _failed(self._loading) else self._loading.result()

    def missing(self) -> str:
        """Empty once it is loaded; else why it is not, for a person to read."""
        if self.loaded() is not None:
            return ""
        if self._loading is None or not _failed(self._loading):
            return "the tokenizer is being loaded"
        error = None if self._loading.cancelled() else self._loading.exception()
        return error.message if isinstance(error, BatonError) else "the tokenizer cannot be loaded; the log says why"

    async def close(self) -> None:
        tasks = [task for task in (self._keeping, self._loading) if task is not None]
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Tokenizer):
                outcome.close()

    def _wanted(self) -> _Origin | None:
        """None while nobody has said it."""
        if self._source:
            return _Origin(self._source, b"")
        model = self._workers.model
        return None if model is None else _Origin(model.source, model.model_fingerprint)

    async def _keep(self) -> None:
        while True:
            if self._wanted() is None or self.loaded() is not None:
                await self._workers.wait_change(_RELOAD_SECONDS)
                continue
            try:
                await self.get()
            except Exception as error:  # a load may fail in ways of its libraries' own; none may end the retries
                trace = None if isinstance(error, BatonError) else error
                _log.error(
                    "no request can be served: the tokenizer cannot be loaded: %s; trying again in %g s",
                    error,
                    _RELOAD_SECONDS,
                    exc_info=trace,
                )
                await asyncio.sleep(_RELOAD_SECONDS)


def _failed(task: asyncio.Task[Tokenizer]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
