"""An event loop in virtual time: its clock stands while anything can run, and then jumps to the next timer.

Every callback belongs to a *node*, one life of one process, through the context that it runs in. A node that is paused
keeps its callbacks for later, one that is dead keeps them for ever: that is all there is to SIGSTOP and SIGKILL here.
No threads, no sockets, no real time. What would run on another thread runs here, a little later.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack, cast

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Stalled(Exception):
    """Nothing can run and no timer is set: everybody waits for ever."""


class Node:
    """One life of one process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.paused = False
        self.dead = False
        self.held: list[asyncio.Handle] = []
        """What would have run while it could not."""
        self.context = contextvars.copy_context()
        self.context.run(NODE.set, self)

    @property
    def runs(self) -> bool:
        return not self.paused and not self.dead


NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
_numbers = itertools.count()


class _Task(asyncio.Task[Any]):
    """Sets of tasks are iterated over in asyncio's own code: their order must not depend on addresses in memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._number = next(_numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    _ready: Any
    _scheduled: Any

    def __init__(self, thread_seconds: Callable[[], float], after: Callable[[Node | None], None]) -> None:
        """`thread_seconds` draws how long work on another thread takes; `after` is called behind every callback."""
        super().__init__()
        self._now = 0.0
        self._thread_seconds = thread_seconds
        self._after = after
        self.tasks: list[asyncio.Task[Any]] = []
        """All there ever were: none may be collected while others go on, for that would run code of theirs."""
        self.callbacks = 0
        self.set_task_factory(cast(Any, self._make_task))

    def time(self) -> float:
        return self._now

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        self.call_later(self._thread_seconds(), _work, future, func, args)
        return future

    def resume(self, node: Node) -> None:
        node.paused = False
        held, node.held = node.held, []
        self._ready.extend(held)

    def _run_once(self) -> None:
        if not self._ready:
            self._jump()
        handle = self._ready.popleft()
        if handle._cancelled:
            return
        node = handle._context.get(NODE)
        if node is not None and not node.runs:
            node.held.append(handle)
            return
        self.callbacks += 1
        handle._run()
        self._after(node)

    def _jump(self) -> None:
        """To the next timer that somebody still waits for."""
        while self._scheduled:
            timer = heapq.heappop(self._scheduled)
            timer._scheduled = False
            if timer._cancelled:
                self._timer_cancelled_count = max(0, self._timer_cancelled_count - 1)
                continue
            self._now = max(self._now, timer._when)
            self._ready.append(timer)
            return
        raise Stalled

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> _Task:
        task = _Task(coro, loop=loop, **kwargs)
        self.tasks.append(task)
        return task

    _timer_cancelled_count = 0

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass


def _work(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return  # its thread had not begun
    try:
        future.set_result(func(*args))
    except Exception as error:
        future.set_exception(error)
