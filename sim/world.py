"""One scenario's system and its story: starts it, lets clients ask and faults happen, and asks the invariants."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from kvtransfer.memory import PoolMemory
from kvtransfer.transports.fake import FakeNetwork, Faults
from sim import invariants
from sim.client import GRACE_SECONDS, Client
from sim.faults import FaultDriver
from sim.loop import Node, Stalled, VirtualLoop
from sim.network import Network
from sim.reached import Reached
from sim.redis import SimRedis
from sim.router import REQUEST_TIMEOUT, RouterLife
from sim.scenario import CLIENTS, LOAD_SECONDS, REDIS, RequestSpec, RouterSpec, Scenario, WorkerSpec
from sim.seed import last_requests
from sim.trace import Trace
from sim.worker import Life

_FREED_SECONDS = 1.0
_SETTLE_SECONDS = 30.0
"""Longer than any timeout that what is left may have to run into, beside the lease."""
_LOOK_SECONDS = 0.5
_STILL_SECONDS = 1.0


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
    reached: Reached
    lines: tuple[str, ...]


class LoopClock:
    """Of each node, its own."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.now = loop.time


class World:
    def __init__(self, scenario: Scenario, *, story: bool = False) -> None:
        self.scenario = scenario
        self._draw = Random(f"delays {scenario.seed}")
        self.loop = VirtualLoop(lambda: self._draw.uniform(0, scenario.delays.thread))
        self.clock = LoopClock(self.loop)
        self.trace = Trace(lambda: self.loop.now, story=story)
        self.failures: list[str] = []
        self.network = Network(self.loop, self._draw, scenario.delays, self.trace, self.broken)
        self.redis = SimRedis(
            self.loop,
            lambda: self._draw.uniform(0, scenario.delays.usual),
            lambda place: self.network.cut_until(place, REDIS),
        )
        faults = Faults(
            delay=scenario.transport_delay,
            corrupt=scenario.transport_corrupt,
            duplicate=scenario.transport_duplicate,
            drop=scenario.transport_drop,
            straggle=scenario.transport_straggle,
            straggle_delay=scenario.transport_straggle_delay,
        )
        self.transport = FakeNetwork(scenario.seed, faults, self.loop.pause, self._bytes_are_cut)
        self.outside = Node("outside")
        self.faults = FaultDriver(self)
        self.clients: list[Client] = []
        self.lives: dict[str, Life | RouterLife] = {}
        """By place, the latest."""
        self._all: list[Life | RouterLife] = []
        self._over = False

    def workers(self) -> Iterator[Life]:
        return (life for life in self.lives.values() if isinstance(life, Life))

    def routers(self) -> Iterator[RouterLife]:
        return (life for life in self.lives.values() if isinstance(life, RouterLife))

    def start(self, spec: WorkerSpec | RouterSpec, number: int = 0) -> None:
        life = Life(self, spec, number) if isinstance(spec, WorkerSpec) else RouterLife(self, spec, number)
        self.lives[spec.id] = life
        self._all.append(life)
        size = f": {spec.num_blocks} blocks of {spec.block_size}" if isinstance(spec, WorkerSpec) else ""
        self.trace.note(f"{life.node.name} starts{size}")

    def _bytes_are_cut(self, source: str, memory: PoolMemory) -> bool:
        return any(life.memory is memory and self.network.is_cut(source, life.spec.id) for life in self.workers())

    # --- what goes wrong is found

    def broken(self, what: str) -> None:
        if not self._over:
            self.failures.append(what)
            self.trace.note(f"BROKEN: {what}")
            self.loop.stop()

    # --- the story

    def run(self) -> Outcome:
        loop = self.loop
        loop.set_exception_handler(self._on_exception)
        watch = _ErrorLog(self.broken)
        root = logging.getLogger()
        level, handlers, root.handlers = root.level, root.handlers, [watch]
        disabled = root.manager.disable
        root.setLevel(logging.ERROR)
        logging.disable(logging.WARNING)
        try:
            main = self.outside.context.run(loop.create_task, self._main())
            try:
                loop.run_until_complete(main)
            except Stalled:
                self.broken("everybody waits for ever, or goes round in circles for ever")
            except RuntimeError:
                if not self.failures:
                    raise
            return self._outcome()
        finally:
            self._over = True
            loop.bury(life.node for life in self._all)
            root.setLevel(level)
            root.handlers = handlers
            logging.disable(disabled)

    async def _main(self) -> None:
        scenario, people = self.scenario, Node(CLIENTS)
        for worker in scenario.workers:
            self.start(worker)
        for router in scenario.routers:
            self.start(router)
        self.faults.start()
        await self._ask(scenario.requests, people, must_succeed=scenario.must_succeed)
        await self._settle()
        await self._ask(last_requests(scenario, self.loop.now), people, must_succeed=True)
        await self._settle()
        if scenario.is_calm:
            for what in invariants.of_calm(self.reached()):
                self.broken(what)

    async def _ask(self, requests: Sequence[RequestSpec], people: Node, *, must_succeed: bool) -> None:
        """Returns when all are over."""
        clients = [Client(self, spec, must_succeed=must_succeed) for spec in requests]
        self.clients += clients
        asking = [people.context.run(asyncio.create_task, client.run()) for client in clients]
        if asking:
            await asyncio.wait(asking, timeout=LOAD_SECONDS + REQUEST_TIMEOUT + 2 * GRACE_SECONDS)
        for client in clients:
            if not client.ended:
                self.broken(f"{client.spec.name} never got a terminal reply")
        for task in asking:
            if task.done() and not task.cancelled() and task.exception() is not None:
                self.broken(f"a client failed: {task.exception()!r}")

    def asked(self, timeout: float, name: str) -> None:
        """Workers keep a deadline by themselves: also where their router cannot tell them that it has passed."""
        late = 2 * GRACE_SECONDS + self.scenario.delays.longest
        self.loop.later(timeout + late, self._check_deadline, name, timeout, node=self.outside)

    def _check_deadline(self, name: str, timeout: float) -> None:
        for life in self.workers():
            if life.booted and life.node.runs and not self.faults.stopped(life.spec.id, self.loop.now - GRACE_SECONDS):
                for attempt in life.overdue(name, timeout + GRACE_SECONDS):
                    self.broken(f"{life.node.name} still computes {attempt}, whose deadline is past")

    def asked_no_more(self, name: str) -> None:
        """A request is over for its client: where nothing goes wrong, it soon is everywhere."""
        if self.scenario.is_calm:
            seconds = _FREED_SECONDS + self.scenario.transport_straggle_delay
            self.loop.later(seconds, self._check_freed, name, node=self.outside)

    def _check_freed(self, name: str) -> None:
        for life in self.workers():
            for attempt in life.holds(name):
                self.broken(f"{life.node.name} still works for {attempt}, which is over for its client")

    async def _settle(self) -> None:
        """All faults are over, and what they left has its time to run out. At rest is who stays so, with nothing under
        way to him: to wait longer would change nothing."""
        loop, scenario = self.loop, self.scenario
        await loop.pause(max(0.0, scenario.over_at + _LOOK_SECONDS - loop.now))
        until = loop.now + _SETTLE_SECONDS + 2 * scenario.lease_seconds
        while loop.now < until:
            await loop.pause(_LOOK_SECONDS)
            if self._everybody_runs() and not next(invariants.at_rest(self), ""):
                still = max(loop.now, self.network.quiet_at) + _STILL_SECONDS
                await loop.pause(still + scenario.transport_straggle_delay - loop.now)
                break
        for what in invariants.at_rest(self):
            self.broken(what)

    def reached(self) -> Reached:
        workers = (life for life in self._all if isinstance(life, Life) and life.booted)
        routers = (life for life in self._all if isinstance(life, RouterLife) and life.booted)
        return Reached.of(workers, routers, self.network)

    def _everybody_runs(self) -> bool:
        return all(life.booted and life.node.runs and not life.draining for life in self.lives.values())

    # --- the end

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        node = self.loop.running
        self.broken(f"{node.name if node else 'nobody'}: {context.get('message')}: {context.get('exception')!r}")

    def _outcome(self) -> Outcome:
        return Outcome(
            seed=self.scenario.seed,
            broken=tuple(self.failures),
            events=self.trace.events,
            digest=self.trace.digest,
            seconds=self.loop.now,
            answered=sum(client.answered for client in self.clients),
            requests=len(self.clients),
            reached=self.reached(),
            lines=tuple(self.trace.lines),
        )


class _ErrorLog(logging.Handler):
    """Production logs an error where it has met a defect of its own: a broken invariant like any other."""

    def __init__(self, broken: Any) -> None:
        super().__init__(logging.ERROR)
        self._tell = broken

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self._tell(f"an error was logged: {record.getMessage()}" + (f" ({cause!r})" if cause else ""))
