"""Ctrl-C is heeded at once, whatever thread of the process the kernel gives it to."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from baton.cli import interrupt

SECONDS = 10.0


@contextmanager
def key_for_another_thread() -> Iterator[None]:
    """A thread gets the signal while the main thread waits: as if it came just before that began to wait."""

    def interrupted() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=interrupted)
    thread.start()
    yield
    thread.join()


def test_a_key_wakes_a_loop_that_waits() -> None:
    cancelled = []

    async def waits() -> None:
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    started = time.monotonic()
    with asyncio.Runner() as runner, key_for_another_thread(), pytest.raises(KeyboardInterrupt):
        interrupt.run(runner, waits())
    assert cancelled
    assert time.monotonic() - started < SECONDS / 2


def test_what_is_not_interrupted_ends_as_it_would() -> None:
    async def answers() -> int:
        return 7

    async def fails() -> int:
        raise ValueError("wrong")

    before: Callable[..., object] | int | None = signal.getsignal(signal.SIGINT)
    with asyncio.Runner() as runner:
        assert interrupt.run(runner, answers()) == 7
        with pytest.raises(ValueError, match="wrong"):
            interrupt.run(runner, fails())
        assert interrupt.run(runner, answers()) == 7
    assert signal.getsignal(signal.SIGINT) is before
