"""Starts the parts of a system as processes, watches them, starts them again when they die, and ends them in order.

It knows a part only by its command line and by the line `baton … ready key=value …` that it prints on stdout. The
parts die with this process, however it dies.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from baton.attached import attached
from baton.errors import ConfigError

_MAX_RESTARTS = 5
_RESTART_WINDOW_SECONDS = 60.0
_PROGRESS_SECONDS = 5.0


@dataclass
class Part:
    """One process, over all its restarts."""

    name: str
    argv: Sequence[str]
    ready: dict[str, str] = field(default_factory=dict)
    """The pairs of its last ready line; empty until it is ready."""
    process: asyncio.subprocess.Process | None = None
    deaths: list[float] = field(default_factory=list)
    """When it died, of late."""
    was_ready: bool = False
    """Ever."""
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` shows a line to the person who waits."""
        self._say = say
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to what is wrong when a part cannot be kept running."""

    async def start(self, part: Part) -> None:
        await self._spawn(part)
        watcher = asyncio.create_task(self._watch(part))
        watcher.add_done_callback(partial(self._check_watcher, part))
        self._watchers[part.name] = watcher

    async def wait_ready(self, parts: Sequence[Part]) -> None:
        """Until all are ready. Raises ConfigError when one ends first; says what it waits for."""
        waiting = asyncio.gather(*(part.is_ready.wait() for part in parts))
        try:
            while True:
                done, _ = await asyncio.wait(
                    (waiting, self.failed), timeout=_PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if self.failed in done:
                    raise ConfigError(self.failed.result())
                if done:
                    return
                missing = ", ".join(part.name for part in parts if not part.is_ready.is_set())
                self._say(f"still waiting for {missing}")
        finally:
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting

    async def stop(self, groups: Sequence[Sequence[Part]], seconds: float) -> None:
        """SIGTERM to one group after the other, so that each can finish what the one before still needs; a part that
        takes longer than `seconds` is killed."""
        self._stopping.set()
        for group in groups:
            group = [part for part in group if part.name in self._watchers]
            running = [p for p in group if p.process is not None and p.process.returncode is None]
            for part in running:
                self._signal(part, signal.SIGTERM)
            watchers = {part.name: self._watchers[part.name] for part in group}  # they end with their processes
            if watchers:
                await asyncio.wait(watchers.values(), timeout=seconds)
            for part in group:
                if not watchers[part.name].done():
                    self._say(f"{part.name} did not end within {seconds:.0f} s and is killed")
                    self._signal(part, signal.SIGKILL)
                    await asyncio.wait([watchers[part.name]])

    async def _spawn(self, part: Part) -> None:
        part.ready = {}
        part.is_ready.clear()
        part.process = await asyncio.create_subprocess_exec(
            *attached(part.argv, signal.SIGTERM),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which ends its parts in order
        )

    async def _watch(self, part: Part) -> None:
        while True:
            assert part.process is not None, "a watched part has been started"
            await self._read_output(part)
            status = await part.process.wait()
            if self._stopping.is_set():
                return
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            now = time.monotonic()
            part.deaths = [d for d in part.deaths if now - d < _RESTART_WINDOW_SECONDS] + [now]
            if not part.was_ready:
                self._fail(f"{part.name} could not start: it {how}; what it said is above")
                return
            if len(part.deaths) > _MAX_RESTARTS:
                self._fail(
                    f"{part.name} died {len(part.deaths)} times within {_RESTART_WINDOW_SECONDS:.0f} s: given up"
                )
                return
            self._say(f"{part.name} {how}; starting it again")
            await asyncio.sleep(0.1 * len(part.deaths))
            if self._stopping.is_set():
                return
            await self._spawn(part)
            if self._stopping.is_set():  # `stop` has not seen this one
                self._signal(part, signal.SIGTERM)

    def _check_watcher(self, part: Part, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and (error := watcher.exception()) is not None:
            self._fail(f"{part.name} can be watched no longer: {error!r}")

    async def _read_output(self, part: Part) -> None:
        """To the end."""
        assert part.process is not None, "a watched part has been started"
        assert part.process.stdout is not None, "stdout is a pipe"
        async for line in part.process.stdout:
            text = line.decode(errors="replace").rstrip()
            words = text.split()
            if len(words) > 2 and words[0] == "baton" and words[2] == "ready":
                part.ready = dict(word.split("=", 1) for word in words[3:] if "=" in word)
                part.was_ready = True
                part.is_ready.set()
            else:
                print(text, file=sys.stderr)

    def _fail(self, message: str) -> None:
        if not self.failed.done():
            self.failed.set_result(message)

    def _signal(self, part: Part, number: signal.Signals) -> None:
        assert part.process is not None
        with suppress(ProcessLookupError):
            part.process.send_signal(number)
