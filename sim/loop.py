"""An event loop in virtual time: its clock stands while anything can run, and then jumps to the next timer.

Every callback belongs to a *node*, one life of one process, through the context that it runs in. A node that is paused
keeps its callbacks for later, one that is dead keeps them for ever: that is all there is to SIGSTOP and SIGKILL here.
A node has a clock of its own, which runs a little fast or slow and may jump ahead: `time`, and with it every timer that
production sets, is in the time of whoever asks. `now` and `later` are in true time, for what is nobody's: the network,
another thread's work, faults. No threads, no sockets, no real time. What would run on another thread runs here, later.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack, cast

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Stalled(Exception):
    """Nothing can run and no timer is set: everybody waits for ever."""


class Node:
    """One life of one process, at a place where it may have had others before."""

    def __init__(self, place: str, number: int = 0, rate: float = 1.0) -> None:
        """`rate`: seconds of its clock in a true second."""
        self.place = place
        self.name = f"{place}.{number}"
        self.paused = False
        self.dead = False
        self.held: list[asyncio.Handle | Timer] = []
        """What would have run while it could not."""
        self.context = contextvars.copy_context()
        self.context.run(NODE.set, self)
        self._rate = rate
        self._ahead = 0.0

    @property
    def runs(self) -> bool:
        return not self.paused and not self.dead

    def local(self, now: float) -> float:
        return self._ahead + self._rate * now

    def true(self, local: float) -> float:
        """The first moment at which the node's clock shows no less than `local`."""
        now = (local - self._ahead) / self._rate
        while self.local(now) < local:
            now = math.nextafter(now, math.inf)
        return now

    def jump(self, seconds: float) -> None:
        self._ahead += seconds


NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
_MOST_CALLBACKS = 500_000


class _Task(asyncio.Task[Any]):
    """Sets of tasks are iterated over in asyncio's own code: their order must not depend on addresses in memory."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class Timer:
    """An asyncio.Handle without what only debugging needs: a seed makes a thousand."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context) -> None:
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True


class VirtualLoop(asyncio.BaseEventLoop):
    _ready: deque[asyncio.Handle]
    _stopping: bool

    def __init__(self, thread_seconds: Callable[[], float]) -> None:
        """`thread_seconds` draws how long work on another thread takes."""
        super().__init__()
        self.now = 0.0
        """True time."""
        self.callbacks = 0
        self.tasks: list[asyncio.Task[Any]] = []
        """All there ever were: none may be collected while others go on, for that would run code of theirs."""
        self._timers: list[tuple[float, int, asyncio.Handle | Timer]] = []
        self._timer_numbers = itertools.count()  # timers of one moment fire in the order in which they were set
        self.running: Node | None = None
        """Whose callback it is."""
        self._thread_seconds = thread_seconds
        self.set_task_factory(cast(Any, self._make_task))

    # --- for production, in each node's own time

    def time(self) -> float:
        node = self.running
        return self.now if node is None else node.local(self.now)

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:  # fmt: skip
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        node = handle._context.get(NODE)  # type: ignore[attr-defined]  # stubs leave it out
        true = when if node is None else node.true(when)
        heapq.heappush(self._timers, (true, next(self._timer_numbers), handle))
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        self.later(self._thread_seconds(), _work, future, func, args)
        return future

    # --- in true time

    def later(
        self, seconds: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, node: Node | None = None
    ) -> Timer:
        """In the life of `node`, or of whoever calls."""
        return self.at(self.now + seconds, callback, *args, node=node)

    def at(self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, node: Node | None = None) -> Timer:
        timer = Timer(callback, args, contextvars.copy_context() if node is None else node.context)
        heapq.heappush(self._timers, (when, next(self._timer_numbers), timer))
        return timer

    async def pause(self, seconds: float) -> None:
        future = self.create_future()
        timer = self.later(seconds, _wake, future)
        try:
            await future
        finally:
            timer.cancel()

    def jump(self, node: Node, seconds: float) -> None:
        """The node's clock jumps ahead: what it waits for by it comes so much sooner."""
        node.jump(seconds)
        for at, (when, number, handle) in enumerate(self._timers):
            if not isinstance(handle, asyncio.TimerHandle):
                continue
            if handle._context.get(NODE) is node:  # type: ignore[attr-defined]  # stubs leave it out
                self._timers[at] = (min(when, max(self.now, node.true(handle.when()))), number, handle)
        heapq.heapify(self._timers)

    def resume(self, node: Node) -> None:
        node.paused = False
        held, node.held = node.held, []
        self._ready.extend(cast(Any, held))

    def bury(self, nodes: Iterable[Node]) -> None:
        """Ends all tasks, those of the dead among `nodes` too, and the loop. A coroutine that is collected while it
        waits runs code of its own."""
        for node in nodes:
            node.dead = False
            self.resume(node)
        for _ in range(10):
            pending = [task for task in self.tasks if not task.done()]
            if not pending:
                break
            for task in pending:
                task.cancel()
            try:
                self.run_until_complete(asyncio.wait(pending, timeout=5.0))
            except RuntimeError:
                continue  # it was stopped: by what had stopped it before
            except Stalled:
                break
        for task in self.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own; stubs leave it out
            if task.done() and not task.cancelled():
                task.exception()
        self.close()

    # --- how it turns

    def _run_once(self) -> None:
        """Until it is stopped: what asyncio does in between is for sockets and slow callbacks, and there are none."""
        ready: Any = self._ready
        while not self._stopping:
            handle = ready.popleft() if ready else self._next_timer()
            if handle._cancelled:
                continue
            context = handle._context
            node = context.get(NODE)
            if node is not None and (node.paused or node.dead):
                node.held.append(handle)
                continue
            self.callbacks += 1
            if self.callbacks > _MOST_CALLBACKS:
                raise Stalled
            self.running = node
            try:
                context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                what = getattr(handle._callback, "__qualname__", "a callback")  # no repr: it may hold an address
                self.call_exception_handler({"message": f"{what} failed", "exception": error})
            finally:
                self.running = None

    def _next_timer(self) -> Any:
        """Jumps to the next one that somebody still waits for."""
        timers: Any = self._timers
        while timers:
            when, _, handle = heapq.heappop(timers)
            if not handle._cancelled:
                if when > self.now:
                    self.now = when
                return handle
        raise Stalled

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> _Task:
        task = _Task(len(self.tasks), coro, loop=loop, **kwargs)
        self.tasks.append(task)
        return task

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _work(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return  # its thread had not begun
    try:
        future.set_result(func(*args))
    except Exception as error:
        future.set_exception(error)
