"""The router's core: what the doors call. Admits requests, has them checked and prepared, and streams them.

Owns the count of open requests and the request metrics of the served model. A request's own life is router/stream.py,
the tokenizer's router/loading.py. Never speaks to a worker itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from baton.clock import Clock, MonotonicClock
from baton.config import RoutingConfig
from baton.errors import DeadlineExceeded, Overloaded, Unavailable
from baton.metrics import Metrics, RequestMetrics, RouterMetrics
from baton.v1 import inference_pb2
from router.loading import TokenizerLoader
from router.model import ModelInfo
from router.prepare import PreparedRequest, check_form, check_model, prepare
from router.request import Chunk, GenerateSpec, ServedModel
from router.stream import Stream
from router.text.tokenizer import Tokenizer
from router.workers import Workers

T = TypeVar("T")


class Relay:
    """Implements `router.request.Generates`. `model` is where the tokenizer is; empty: where the workers say."""

    def __init__(
        self,
        workers: Workers,
        config: RoutingConfig,
        metrics: Metrics,
        router_metrics: RouterMetrics,
        *,
        model: str = "",
        load_tokenizer: Callable[[str], Tokenizer] = Tokenizer.load,
        clock: Clock | None = None,
    ) -> None:
        self.workers = workers
        self.open_requests = 0
        self.draining = False
        """Once set, new requests are refused; open ones go on until `cut_off`."""
        self._config = config
        self._metrics = metrics
        self._router_metrics = router_metrics
        self._loader = TokenizerLoader(workers, model, load_tokenizer)
        self._clock = clock or MonotonicClock()
        self._request_metrics: RequestMetrics | None = None
        self._cut_off = False
        self._waiting: set[asyncio.Timeout] = set()
        """Of every open request that waits for its next chunk."""
        self._idle = asyncio.Event()
        self._idle.set()

    # --- what doors ask

    def models(self) -> list[ServedModel]:
        model = self.workers.model
        return [] if model is None else [ServedModel(model.name, model.max_model_len)]

    def ready(self) -> str:
        """Empty when requests can be served now; else what is missing."""
        if self.draining:
            return "the router is shutting down"
        return self.workers.missing() or self._loader.missing()

    def status(self) -> list[inference_pb2.WorkerStatus]:
        return self.workers.status()

    @property
    def redis_connected(self) -> bool:
        return self.workers.directory.connected

    async def tokenizer(self) -> Tokenizer:
        """Of the served model; waits for it. Raises CheckpointError, or whatever else the load failed with."""
        return await self._loader.get()

    def start(self) -> None:
        self._loader.start()

    # --- a request

    async def generate(self, spec: GenerateSpec) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self._generate(spec)) as chunks:
            while True:
                try:
                    chunk = await self._unless_cut_off(anext(chunks))
                except StopAsyncIteration:
                    return
                yield chunk

    async def _generate(self, spec: GenerateSpec) -> AsyncGenerator[Chunk, None]:
        arrived_at = self._clock.now()
        with self._admitted():
            check_form(spec)
            seconds = spec.timeout_seconds
            deadline = arrived_at + (self._config.request_timeout_seconds if seconds is None else seconds)
            model = await self._served_model(deadline)
            metrics = self._metrics_of(model)
            with _counting_bad_ends(metrics) as end:
                check_model(spec, model)
                request, tokenizer = await self._until(deadline, self._prepare(spec, model))
                stream = Stream(
                    request,
                    tokenizer,
                    self.workers,
                    self._config,
                    self._clock,
                    (metrics, self._router_metrics),
                    arrived_at=arrived_at,
                    deadline=deadline,
                )
                async with aclosing(stream.run()) as chunks:
                    async for chunk in chunks:
                        end.came = chunk.finished is not None
                        yield chunk

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits for the open ones; whether all ended in time."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """Ends every open request with an error that says why, so that no client sees an answer break off."""
        self.draining = self._cut_off = True
        for waiting in self._waiting:
            waiting.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        await self._loader.close()

    # --- its parts

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.draining:
            raise Unavailable("the router is shutting down and takes no new requests")
        if self.open_requests >= self._config.max_waiting_requests:
            raise Overloaded(
                f"{self.open_requests} requests are open, the most that are taken (--max-waiting-requests); "
                "try again later"
            )
        self.open_requests += 1
        self._router_metrics.requests_open.set(self.open_requests)
        self._idle.clear()
        try:
            yield
        finally:
            self.open_requests -= 1
            self._router_metrics.requests_open.set(self.open_requests)
            if not self.open_requests:
                self._idle.set()

    async def _unless_cut_off(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(0 if self._cut_off else None) as waiting:
                self._waiting.add(waiting)
                try:
                    return await work
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            raise Unavailable("the router is shutting down; ask again") from None

    async def _served_model(self, deadline: float) -> ModelInfo:
        """Waits for a first worker where none has said yet what is served."""
        give_up = min(deadline, self._clock.now() + self._config.resume_timeout_seconds)
        while self.workers.model is None:
            now = self._clock.now()
            if now >= give_up:
                kind = DeadlineExceeded if now >= deadline else Unavailable
                raise kind(f"nothing is served yet: {self.workers.missing()}")
            await self.workers.wait_change(give_up - now)
        return self.workers.model

    async def _prepare(self, spec: GenerateSpec, model: ModelInfo) -> tuple[PreparedRequest, Tokenizer]:
        try:
            tokenizer = await self.tokenizer()
        except Exception as error:  # the loader logs it and tries again; its words are of paths and libraries
            raise Unavailable("the tokenizer could not be loaded; the router's log says why") from error
        return await prepare(spec, model, tokenizer), tokenizer

    async def _until(self, deadline: float, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(max(deadline - self._clock.now(), 0.0)):
                return await work
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the prompt was tokenised") from None

    def _metrics_of(self, model: ModelInfo) -> RequestMetrics:
        if self._request_metrics is None:  # the served name never changes
            self._request_metrics = RequestMetrics(self._metrics, model.name)
        return self._request_metrics


@dataclass(slots=True)
class _End:
    came: bool = False


@contextmanager
def _counting_bad_ends(metrics: RequestMetrics) -> Iterator[_End]:
    end = _End()
    try:
        yield end
    except Exception:
        metrics.ended("error")
        raise
    except (asyncio.CancelledError, GeneratorExit):
        if not end.came:  # a client may go as soon as it has the last chunk
            metrics.ended("abort")
        raise
