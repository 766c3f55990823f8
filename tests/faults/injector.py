"""Does to a system what a schedule of faults says, and undoes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterable

from tests.faults.proxy import Direction, Proxy
from tests.faults.schedule import Fault, Kind
from tests.faults.system import FaultySystem

_BOTH = frozenset(Direction)
_PARTS = (Kind.KILL, Kind.RESTART, Kind.STOP)


class Injector:
    def __init__(self, system: FaultySystem) -> None:
        self._system = system
        self._strikes: set[asyncio.Task[None]] = set()
        self._down: set[str] = set()
        self.story: list[str] = []
        """What was done, when."""
        self.done: Counter[Kind] = Counter()

    async def run(self, faults: Iterable[Fault]) -> None:
        """Until cancelled. A fault that can't be, of a part that is down already, is left out."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for fault in faults:
            await asyncio.sleep(begin + fault.at - loop.time())
            if self._possible(fault):
                self.done[fault.kind] += 1
                self.story.append(str(fault))
                strike = loop.create_task(self._strike(fault))
                self._strikes.add(strike)
                strike.add_done_callback(self._strikes.discard)

    async def heal(self) -> None:
        """Returns once every fault is over and every part serves again."""
        await asyncio.gather(*self._strikes)
        await self._system.serves()

    def _possible(self, fault: Fault) -> bool:
        if fault.kind in _PARTS:
            return fault.target not in self._down and self._system.parts[fault.target].pid is not None
        return fault.target in self._system.proxies

    async def _strike(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL:
                await self._start_again(fault, signal.SIGKILL)
            case Kind.RESTART:
                await self._start_again(fault, signal.SIGTERM)
            case Kind.STOP:
                await self._stop(fault)
            case _:
                await self._break_link(fault, self._system.proxies[fault.target])

    async def _start_again(self, fault: Fault, number: signal.Signals) -> None:
        part = self._system.parts[fault.target]
        self._down.add(part.name)
        try:
            await part.end(number)
            await asyncio.sleep(fault.seconds)
            await part.start()
            await part.ready.wait()
        finally:
            self._down.discard(part.name)

    async def _stop(self, fault: Fault) -> None:
        pid = self._system.parts[fault.target].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(fault.seconds)
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            os.kill(pid, signal.SIGCONT)

    async def _break_link(self, fault: Fault, proxy: Proxy) -> None:
        match fault.kind:
            case Kind.CUT:
                proxy.cut(fault.client)
            case Kind.TEAR:
                proxy.tear(fault.client)
            case Kind.HALF_CLOSE:
                proxy.half_close(Direction.REPLIES, fault.client)
            case Kind.STALL:
                proxy.stall(_BOTH, fault.client)
            case Kind.DEAF:
                proxy.stall(frozenset({Direction.REPLIES}), fault.client)
            case Kind.DELAY:
                proxy.delay(0.1, fault.client)
        await asyncio.sleep(fault.seconds)
        proxy.heal(fault.client)
