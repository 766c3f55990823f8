"""The supervisor of `baton up` over parts that are a line of Python each."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.cli.supervisor import Part, Supervisor
from baton.errors import ConfigError
from tests.system.harness import until

READY = "print('baton part ready at=here', flush=True)"
SLEEP = "import time; time.sleep(60)"


class Watched:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.supervisor = Supervisor(self.said.append)
        self.parts: list[Part] = []

    async def start(self, code: str, name: str = "part") -> Part:
        part = Part(name, [sys.executable, "-c", code])
        self.parts.append(part)
        await self.supervisor.start(part)
        return part

    def alive(self) -> list[int]:
        return [p.process.pid for p in self.parts if p.process is not None and p.process.returncode is None]


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    watched = Watched()
    yield watched
    await watched.supervisor.stop([watched.parts], 5)
    assert not watched.alive()


async def came_back(part: Part, old_pid: int) -> None:
    async def back() -> bool:
        return part.process is not None and part.process.pid != old_pid and part.is_ready.is_set()

    await until(back, 20, lambda: f"{part.name} was not started again")


async def test_a_part_is_ready_when_it_says_so(watched: Watched) -> None:
    part = await watched.start(f"{READY}; {SLEEP}")
    await watched.supervisor.wait_ready([part])
    assert part.ready == {"at": "here"}


async def test_what_ends_before_it_was_ready_could_not_start(watched: Watched) -> None:
    part = await watched.start("raise SystemExit(3)")
    with pytest.raises(ConfigError, match="part could not start: it ended with status 3"):
        await watched.supervisor.wait_ready([part])


async def test_what_dies_is_started_again(watched: Watched) -> None:
    part = await watched.start(f"{READY}; {SLEEP}")
    await watched.supervisor.wait_ready([part])
    assert part.process is not None
    pid = part.process.pid
    os.kill(pid, signal.SIGKILL)
    await came_back(part, pid)
    assert watched.said == ["part was killed by SIGKILL; starting it again"]


async def test_what_dies_again_and_again_is_given_up(watched: Watched) -> None:
    part = await watched.start(READY)
    await watched.supervisor.wait_ready([part])
    async with asyncio.timeout(20):
        assert "part died 6 times" in await watched.supervisor.failed


async def test_a_stop_during_a_restart_leaves_nothing_running(watched: Watched) -> None:
    part = await watched.start(f"{READY}; {SLEEP}")
    await watched.supervisor.wait_ready([part])
    assert part.process is not None
    os.kill(part.process.pid, signal.SIGKILL)
    await part.process.wait()
    await watched.supervisor.stop([watched.parts], 5)
    assert not watched.alive()


async def test_groups_end_one_after_the_other_and_the_stubborn_are_killed(tmp_path: Path) -> None:
    watched = Watched()
    log = tmp_path / "order"
    note = f"import signal,sys,os; say=lambda n: open({str(log)!r},'a').write(n)"
    polite = f"{note}; signal.signal(15, lambda *_: (say('first '), sys.exit(0))); {READY}; {SLEEP}"
    second = f"{note}; signal.signal(15, lambda *_: (say('second '), sys.exit(0))); {READY}; {SLEEP}"
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); {READY}; {SLEEP}"
    parts = [await watched.start(polite, "a"), await watched.start(second, "b"), await watched.start(deaf, "deaf")]
    await watched.supervisor.wait_ready(parts)
    await watched.supervisor.stop([[parts[0]], [parts[1]], [parts[2]]], 1.0)
    assert log.read_text() == "first second "
    assert watched.said == ["deaf did not end within 1 s and is killed"]
    assert not watched.alive()
