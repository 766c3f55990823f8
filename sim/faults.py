"""What goes wrong: lets each fault of a scenario happen, at its time, to whoever lives at its place then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.network import KEEPALIVE_SECONDS
from sim.router import RouterLife
from sim.scenario import Fault, FaultKind
from sim.worker import Life

if TYPE_CHECKING:
    from sim.world import World

_RESTART_SECONDS = 0.5


class FaultDriver:
    def __init__(self, world: World) -> None:
        self._world = world
        self._silent: dict[str, float] = {}
        """Until when a place may be silent, and others not know it."""
        self._stopped: dict[str, float] = {}

    def start(self) -> None:
        for fault in self._world.scenario.faults:
            self._world.loop.at(fault.at, self._happen, fault)

    def harmed(self, place: str, since: float) -> bool:
        """Whether it was silent after that moment: those who wait for it find out when keepalive does."""
        return self._silent.get(place, 0.0) > since

    def stopped(self, place: str, since: float) -> bool:
        """Whether nothing could run there at some moment after that one."""
        return self._stopped.get(place, 0.0) > since

    def _happen(self, fault: Fault) -> None:
        world = self._world
        match fault.kind:
            case FaultKind.BREAK:
                self._break(fault.number)
            case FaultKind.REDIS_EMPTY:
                world.trace.note("Redis has lost all that it knew")
                world.redis.store.flush()
            case FaultKind.REDIS_AWAY | FaultKind.REDIS_SLOW | FaultKind.REDIS_LIES:
                self._trouble_redis(fault)
            case FaultKind.PARTITION:
                world.trace.note(f"{fault.target} and {fault.other} don't hear each other for {fault.seconds:.2f} s")
                world.network.cut(fault.target, fault.other, fault.seconds, fault.hard)
                for place in fault.places:
                    self._falls_silent(place, fault.seconds)
            case _:
                life = world.lives.get(fault.target)
                if life is not None and life.node.runs and life.booted and not life.draining:
                    self._trouble(life, fault)

    def _break(self, number: int) -> None:
        calls = list(self._world.network.calls)
        if calls:
            call = calls[number % len(calls)]
            server = call.server.name if call.server is not None else "nobody"
            self._world.trace.note(f"the stream {call.path} from {call.client.name} to {server} breaks")
            call.break_off("connection reset")

    def _trouble_redis(self, fault: Fault) -> None:
        redis = self._world.redis
        self._world.trace.note(f"{fault.kind.value} for {fault.seconds:.2f} s".capitalize())
        match fault.kind:
            case FaultKind.REDIS_AWAY:
                redis.up = False
            case FaultKind.REDIS_SLOW:
                redis.slow = fault.number % 1000 / 500
            case _:
                redis.lies = True
        self._world.loop.later(fault.seconds, self._redis_well)

    def _redis_well(self) -> None:
        redis = self._world.redis
        redis.up, redis.slow, redis.lies = True, 0.0, False

    def _trouble(self, life: Life | RouterLife, fault: Fault) -> None:
        node, world, seconds = life.node, self._world, fault.seconds
        match fault.kind:
            case FaultKind.DRAIN:
                world.trace.note(f"{node.name} drains, for {seconds:.2f} s at most")
                life.draining = True
                world.loop.call_soon(life.drain, seconds, context=node.context)
            case FaultKind.PAUSE:
                world.trace.note(f"{node.name} is stopped for {seconds:.2f} s")
                node.paused = True
                if isinstance(life, Life) and life.source is not None:
                    life.source.frozen = True
                world.network.paused(node)
                world.loop.later(seconds, self._go_on, life)
                self._stopped[node.place] = world.loop.now + seconds
                self._falls_silent(node.place, seconds)
            case FaultKind.CLOCK_JUMP:
                world.trace.note(f"{node.name}'s clock jumps {seconds:.2f} s ahead")
                world.loop.jump(node, seconds)
            case _:
                world.trace.note(f"{node.name} is killed" + (", and its host with it" if fault.hard else ""))
                if fault.hard:
                    self._falls_silent(node.place, KEEPALIVE_SECONDS)
                self._end(life, fault.hard, seconds)

    def _falls_silent(self, place: str, seconds: float) -> None:
        until = self._world.loop.now + min(seconds, KEEPALIVE_SECONDS)
        self._silent[place] = max(self._silent.get(place, 0.0), until)

    def _go_on(self, life: Life | RouterLife) -> None:
        self._world.trace.note(f"{life.node.name} goes on")
        if isinstance(life, Life) and life.source is not None:
            life.source.frozen = False
        self._world.loop.resume(life.node)

    def exits(self, life: Life | RouterLife) -> None:
        """Once it has drained."""
        if not life.node.dead:
            self._world.trace.note(f"{life.node.name} has drained and exits")
            self._end(life, False, _RESTART_SECONDS)

    def _end(self, life: Life | RouterLife, silently: bool, seconds: float) -> None:
        life.node.dead = True
        if isinstance(life, Life) and life.source is not None:
            life.source.die()
        self._world.network.died(life.node, silently)
        self._world.loop.later(seconds, self._world.start, life.spec, life.number + 1, node=self._world.outside)
