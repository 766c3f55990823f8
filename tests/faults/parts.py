"""The parts of a system as processes that are started at one address again and again, whatever ends them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from baton.attached import attached
from discovery import EmbeddedRedis
from tests.system.harness import ROOT

_START_AGAIN_SECONDS = 0.5


class Part(Protocol):
    name: str
    ready: asyncio.Event
    """It serves: set by a start, cleared by its end."""
    defects: list[str]
    """What it did that no fault explains."""

    @property
    def pid(self) -> int | None:
        """None while it does not run."""

    async def start(self) -> None: ...

    async def end(self, number: signal.Signals) -> None:
        """Sends SIGKILL or SIGTERM, and returns once it has ended."""


class Process:
    """A worker or the router."""

    def __init__(self, name: str, argv: Sequence[str], log: Path) -> None:
        self.name = name
        self.ready = asyncio.Event()
        self.defects: list[str] = []
        self._argv = argv
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ended_by_us = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        if self.pid is not None:
            return
        self._ended_by_us = False
        with self._log.open("ab") as log:
            await self._spawn(log)
        self._watcher = asyncio.create_task(self._watch())

    async def end(self, number: signal.Signals) -> None:
        self._ended_by_us = True
        self.ready.clear()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
                self._process.send_signal(signal.SIGCONT)  # a stopped one would not end by SIGTERM
        if self._watcher is not None:
            await self._watcher

    async def _spawn(self, log: IO[bytes]) -> None:
        self._process = await asyncio.create_subprocess_exec(
            # SIGKILL ends it even if it is stopped.
            *attached([sys.executable, "-X", "faulthandler", "-m", *self._argv], signal.SIGKILL),
            stdout=asyncio.subprocess.PIPE, stderr=log, cwd=ROOT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    async def _watch(self) -> None:
        """Until it ends by what was sent to it. One that cannot start while Redis is away is started again, as by
        whoever keeps workers running."""
        while True:
            assert self._process is not None
            assert self._process.stdout is not None
            async for line in self._process.stdout:
                if b" ready " in line:
                    self.ready.set()
            status = await self._process.wait()
            was_ready = self.ready.is_set()
            self.ready.clear()
            if not self._ended_by_us and (was_ready or status != 1):
                self.defects.append(f"{self.name} ended by itself with status {status}; see {self._log}")
            if self._ended_by_us:
                return
            await asyncio.sleep(_START_AGAIN_SECONDS)
            if self._ended_by_us:
                return
            with self._log.open("ab") as log:
                await self._spawn(log)


class Redis:
    def __init__(self, port: int) -> None:
        self.name = "redis"
        self.ready = asyncio.Event()
        self.defects: list[str] = []
        self._server = EmbeddedRedis(port)

    @property
    def pid(self) -> int | None:
        return self._server.pid

    async def start(self) -> None:
        await asyncio.to_thread(self._server.start)
        self.ready.set()

    async def end(self, number: signal.Signals) -> None:
        self.ready.clear()
        if (pid := self.pid) is not None:
            os.kill(pid, number)
        await asyncio.to_thread(self._server.stop)
