"""One seed's system and its story: starts it, lets the faults happen, and asks the invariants after every event."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from random import Random
from typing import Any, cast

from baton.config import RoutingConfig
from baton.metrics import Metrics, RouterMetrics
from kvtransfer.transports.fake import FakeNetwork, Faults
from router.relay import Relay
from router.session import SessionOptions
from router.workers import Workers
from sim import invariants
from sim.client import GRACE_SECONDS, Client
from sim.loop import NODE, Node, Stalled, VirtualLoop
from sim.network import Network
from sim.redis import SimDirectory, SimRedis
from sim.scenario import LOAD_SECONDS, Fault, FaultKind, Scenario
from sim.tokenizer import SimTokenizer
from sim.trace import Trace
from sim.worker import Life

_MOST_CALLBACKS = 2_000_000
_RESTART_SECONDS = 0.5
_FREED_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    seed: int
    broken: tuple[str, ...]
    """What must always hold and did not; empty where all is well."""
    events: int
    digest: str
    """Of everything that happened, in order."""
    seconds: float
    """Virtual."""
    answered: int
    requests: int
    lines: tuple[str, ...]


class Broken(Exception):
    """An invariant is: what follows means nothing."""


class LoopClock:
    def __init__(self, loop: VirtualLoop) -> None:
        self.now = loop.time


class World:
    request_timeout = 120.0

    def __init__(self, scenario: Scenario, *, story: bool = False) -> None:
        self.scenario = scenario
        self._draw = Random(f"delays {scenario.seed}")
        self.loop = VirtualLoop(lambda: self._draw.uniform(0, scenario.delays.thread), self._after)
        self.clock = LoopClock(self.loop)
        self.trace = Trace(self.loop.time, story=story)
        self.failures: list[str] = []
        self.network = Network(
            self.loop, self._draw, lambda: scenario.delays.network(self._draw), self.trace, self.broken
        )
        self.redis = SimRedis()
        faults = Faults(
            delay=scenario.transport_delay,
            corrupt=scenario.transport_corrupt,
            duplicate=scenario.transport_duplicate,
            drop=scenario.transport_drop,
            straggle=scenario.transport_straggle,
            straggle_delay=scenario.transport_straggle_delay,
        )
        self.transport = FakeNetwork(scenario.seed, faults)
        self.lives: dict[str, Life] = {}
        self._by_node: dict[Node, Life] = {}
        self.router = Node("router")
        self._over = False

    # --- what goes wrong is found

    def broken(self, what: str) -> None:
        if not self._over:
            self.failures.append(what)
            self.trace.note(f"BROKEN: {what}")

    def _after(self, node: Node | None) -> None:
        if self._over:
            return
        life = self._by_node.get(node) if node is not None else None
        if life is not None and life.booted:
            for what in invariants.after_every_event(life):
                self.broken(what)
        if self.loop.callbacks > _MOST_CALLBACKS:
            self.broken("no end is in sight: something goes round in circles")
        if self.failures:
            self.loop.stop()

    # --- the story

    def run(self) -> Outcome:
        loop = self.loop
        loop.set_exception_handler(self._on_exception)
        watch = _ErrorLog(self.broken)
        root = logging.getLogger()
        level, handlers, root.handlers = root.level, root.handlers, [watch]
        root.setLevel(logging.ERROR)
        try:
            main = self.router.context.run(loop.create_task, self._main())
            try:
                loop.run_until_complete(main)
            except Stalled:
                self.broken("everybody waits for ever")
            except RuntimeError:
                if not self.failures:
                    raise
            return self._outcome()
        finally:
            self._over = True
            self._bury()
            root.setLevel(level)
            root.handlers = handlers

    async def _main(self) -> None:
        """In the router's process, with the clients."""
        scenario = self.scenario
        for spec in scenario.workers:
            self._start(spec.id, 0)
        metrics = Metrics()
        router_metrics = RouterMetrics(metrics)
        directory = SimDirectory(self.redis, scenario.delays.usual)
        self.workers = Workers(
            directory, router_metrics, self.clock, SessionOptions(), open_channel=self.network.open_channel
        )
        routing = RoutingConfig(
            local_prefill_tokens=scenario.local_prefill_tokens,
            fetch_prefix_tokens=2,
            request_timeout_seconds=self.request_timeout,
            resume_timeout_seconds=10.0,
        )
        self.relay = Relay(
            self.workers,
            routing,
            metrics,
            router_metrics,
            load_tokenizer=lambda source: cast(Any, SimTokenizer()),
            clock=self.clock,
        )
        watching = asyncio.create_task(directory.run())
        self.workers.start()
        self.relay.start()
        self.clients = [Client(self, spec) for spec in scenario.requests]
        asking = [asyncio.create_task(client.run()) for client in self.clients]
        for fault in scenario.faults:
            self.loop.call_at(fault.at, self._happen, fault)
        await asyncio.wait(asking, timeout=LOAD_SECONDS + self.request_timeout + 2 * GRACE_SECONDS)
        for client in self.clients:
            if not client.ended:
                self.broken(f"{client.spec.name} never got a terminal reply")
        for task in asking:
            if task.done() and not task.cancelled() and task.exception() is not None:
                self.broken(f"a client failed: {task.exception()!r}")
        await self._settle()
        watching.cancel()

    def asked_no_more(self, name: str) -> None:
        """A request is over for its client: where nothing goes wrong, it soon is everywhere."""
        if self.scenario.is_calm:
            self.loop.call_later(_FREED_SECONDS + self.scenario.transport_straggle_delay, self._check_freed, name)

    def _check_freed(self, name: str) -> None:
        for life in self.lives.values():
            for attempt in life.core.open_attempts:
                if attempt.request_id.partition("~")[0] == name:
                    self.broken(f"{life.node.name} still works for {attempt}, which is over for its client")

    async def _settle(self) -> None:
        """All faults are over, and what they left has had its time to run out."""
        last = max((fault.at + fault.seconds for fault in self.scenario.faults), default=0.0)
        await asyncio.sleep(max(0.0, last - self.loop.time()))
        await asyncio.sleep(12.0 + 2 * self.scenario.lease_seconds)
        for what in invariants.at_rest(self):
            self.broken(what)

    # --- faults

    def _start(self, worker: str, number: int) -> None:
        spec = next(spec for spec in self.scenario.workers if spec.id == worker)
        life = Life(self, spec, number)
        self.lives[worker] = self._by_node[life.node] = life
        self.trace.note(
            f"{life.node.name} starts: {spec.num_blocks} blocks of {spec.block_size} tokens, "
            f"{spec.max_num_seqs} requests at once, {spec.max_num_batched_tokens} tokens a step"
        )

    def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.CRASH | FaultKind.PAUSE | FaultKind.DRAIN:
                names = sorted(self.lives)
                self._stop(self.lives[names[fault.target % len(names)]], fault)
            case FaultKind.BREAK:
                calls = list(self.network.calls)
                if calls:
                    call = calls[fault.target % len(calls)]
                    server = call.server.name if call.server is not None else "nobody"
                    self.trace.note(f"the stream {call.path} from {call.client.name} to {server} breaks")
                    call.break_off("connection reset")
            case FaultKind.REDIS_AWAY:
                self.trace.note(f"Redis is away for {fault.seconds:.2f} s")
                self.redis.up = False
                self.loop.call_later(fault.seconds, self._redis_back)
            case FaultKind.REDIS_EMPTY:
                self.trace.note("Redis has lost all that it knew")
                self.redis.lose_all()

    def _redis_back(self) -> None:
        self.redis.up = True

    def _stop(self, life: Life, fault: Fault) -> None:
        node = life.node
        if not node.runs or not life.booted or life.draining:
            return
        if fault.kind is FaultKind.DRAIN:
            self.trace.note(f"{node.name} drains, for {fault.seconds:.2f} s at most")
            life.draining = True
            self.loop.call_soon(life.drain, fault.seconds, context=node.context)
            return
        if fault.kind is FaultKind.PAUSE:
            self.trace.note(f"{node.name} is stopped for {fault.seconds:.2f} s")
            node.paused = True
            if life.source is not None:
                life.source.frozen = True
            self.network.paused(node)
            self.loop.call_later(fault.seconds, self._go_on, life)
            return
        self.trace.note(f"{node.name} is killed" + (", and its host with it" if fault.silently else ""))
        self._end_life(life, fault.silently, fault.seconds)

    def exits(self, life: Life) -> None:
        """Once it has drained."""
        if not life.node.dead:
            self.trace.note(f"{life.node.name} has drained and exits")
            self._end_life(life, False, _RESTART_SECONDS)

    def _end_life(self, life: Life, silently: bool, seconds: float) -> None:
        life.node.dead = True
        if life.source is not None:
            life.source.die()
        self.network.died(life.node, silently)
        number = int(life.node.name.rpartition(".")[2]) + 1
        self.loop.call_later(seconds, self._start, life.spec.id, number, context=self.router.context)

    def _go_on(self, life: Life) -> None:
        self.trace.note(f"{life.node.name} goes on")
        if life.source is not None:
            life.source.frozen = False
        self.loop.resume(life.node)

    # --- the end

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        node = NODE.get()
        self.broken(f"{node.name if node else 'nobody'}: {context.get('message')}: {context.get('exception')!r}")

    def _outcome(self) -> Outcome:
        answered = sum(client.ended.startswith("is answered") for client in self.clients)
        return Outcome(
            seed=self.scenario.seed,
            broken=tuple(self.failures),
            events=self.trace.events,
            digest=self.trace.digest,
            seconds=self.loop.time(),
            answered=answered,
            requests=len(self.clients),
            lines=tuple(self.trace.lines),
        )

    def _bury(self) -> None:
        """Ends what is left, the dead included: a coroutine that is collected while it waits runs code of its own."""
        loop = self.loop
        for life in self._by_node.values():
            life.node.dead = False
            loop.resume(life.node)
        for task in loop.tasks:
            task.cancel()
        for _ in range(10):
            pending = [task for task in loop.tasks if not task.done()]
            if not pending:
                break
            for task in pending:
                task.cancel()
            try:
                loop.run_until_complete(asyncio.wait(pending, timeout=5.0))
            except RuntimeError:
                continue  # it was stopped: by what had stopped it before
            except Stalled:
                break
        for task in loop.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if task.done() and not task.cancelled():
                task.exception()
        loop.close()


class _ErrorLog(logging.Handler):
    """Production logs an error where it has met a defect of its own: a broken invariant like any other."""

    def __init__(self, broken: Any) -> None:
        super().__init__(logging.ERROR)
        self._tell = broken

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self._tell(f"an error was logged: {record.getMessage()}" + (f" ({cause!r})" if cause else ""))
