"""Ctrl-C while an event loop runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(runner: asyncio.Runner, work: Coroutine[Any, Any, T]) -> T:
    """`runner.run(work)` in the main thread, where Ctrl-C cancels `work` at once and raises KeyboardInterrupt.

    The runner alone notices a key only when its loop comes by. One that is seen by another thread of the process, or
    just before the loop begins to wait, it would notice with the next event, which may be a deadline far away.
    """
    try:
        return runner.run(_interruptible(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)  # which wakes the loop by a descriptor of its own
    try:
        return await task
    finally:
        loop.remove_signal_handler(signal.SIGINT)
