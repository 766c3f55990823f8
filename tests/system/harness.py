"""A whole system as a user starts it, `baton up` and all its processes, and what tests ask of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from baton.client import Client, status_to_json

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


class System:
    def __init__(self, process: asyncio.subprocess.Process, grpc: str, http: str, log: Path) -> None:
        self.process = process
        self.grpc = grpc
        self.http = f"http://{http}"
        self.log = log

    def client(self) -> Client:
        return Client(self.grpc)

    async def workers(self) -> list[dict[str, Any]]:
        async with self.client() as client:
            workers: list[dict[str, Any]] = json.loads(status_to_json(await client.status()))["workers"]
            return workers

    async def worker(self, role: str) -> dict[str, Any]:
        return next(w for w in await self.workers() if w["role"] == role and w["state"] == "ready")

    async def metric(self, name: str, **labels: str) -> float:
        """Summed over all workers and the router."""
        pages = [w["metrics"] for w in await self.workers()]
        total = 0.0
        async with aiohttp.ClientSession() as session:
            for url in [f"http://{page}/metrics" for page in pages] + [f"{self.http}/metrics"]:
                async with session.get(url) as response:
                    total += sum_metric(await response.text(), name, labels)
        return total

    async def blocks(self) -> list[dict[str, int]]:
        """KV blocks by state, of each worker."""
        found = []
        async with aiohttp.ClientSession() as session:
            for worker in await self.workers():
                async with session.get(f"http://{worker['metrics']}/metrics") as response:
                    blocks = metric_by_label(await response.text(), "baton_kv_blocks", "state")
                found.append({state: int(count) for state, count in blocks.items()})
        return found

    async def assert_idle(self, within: float = 20.0) -> None:
        """Invariants 3 and 4: blocks add up, and none is active, offered, landing or quarantined."""

        async def idle() -> bool:
            held = ("active", "offered", "landing", "quarantined")
            workers = {w["id"]: w["total_blocks"] for w in await self.workers()}
            blocks = await self.blocks()
            assert len(blocks) == len(workers)
            for states, total in zip(blocks, workers.values(), strict=True):
                assert total in (0, sum(states.values())), f"{states} do not add up to {total}"
            return all(states[state] == 0 for states in blocks for state in held)

        await until(idle, within, lambda: f"the pools are not idle; see {self.log}")

    async def kill(self, role: str) -> int:
        """kill -9; the process id."""
        pid: int = (await self.worker(role))["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 60)


@asynccontextmanager
async def system(
    model: Path | str, log: Path, *flags: str, ends_with: int = 0, command: str = "baton.cli.main"
) -> AsyncIterator[System]:
    """`baton up` on free ports, until the block ends; it must then end with that status. `command` is the module that
    is run in the place of Baton's own."""
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", command, "up", f"--model={model}", "--grpc-port=0", "--http-port=0", *flags,
            stdout=asyncio.subprocess.PIPE, stderr=stderr, cwd=ROOT,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), START_SECONDS)).decode()
        assert line.startswith("baton ready "), f"baton up said {line!r}; its log:\n{tail(log)}"
        doors = dict(pair.split("=", 1) for pair in line.split()[2:])
        running = System(process, doors["grpc"], doors["http"], log)
        yield running
        status = await running.stop()
        assert status == ends_with, f"baton up ended with {status}; its log:\n{tail(log)}"
        assert "is killed" not in tail(log), f"a part did not end by itself; the log:\n{tail(log)}"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def tail(log: Path) -> str:
    return log.read_text()[-3000:]


async def run_cli(*arguments: str, stdin: bytes = b"", seconds: float = 60.0) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `baton …`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.cli.main", *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), seconds)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def until(true: Callable[[], Awaitable[bool]], seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < deadline, why()
        await asyncio.sleep(0.1)


def sum_metric(page: str, name: str, labels: dict[str, str]) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and all(sample.labels.get(k) == v for k, v in labels.items())
    )


def metric_by_label(page: str, name: str, label: str) -> dict[str, float]:
    return {
        sample.labels[label]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    }


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    return [int(w) for task in Path(f"/proc/{pid}/task").iterdir() for w in (task / "children").read_text().split()]


def running_now(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
