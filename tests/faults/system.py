"""A whole real system whose parts reach each other only through proxies that can break what they carry.

    part listens on 127.0.0.1:PORT  ◄──  proxy on 127.0.0.2:PORT  ◄──  whoever was told the part's address

A part is told to advertise 127.0.0.2, so nobody needs to know of the proxies. Tests themselves talk to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from baton import model_in_the_box
from baton.client import Client
from tests.faults.parts import Part, Process, Redis
from tests.faults.proxy import Proxy
from tests.faults.sockets import free_ports, listening_ports, owner
from tests.system.harness import metric_by_label, sum_metric

REAL, PROXIED = "127.0.0.1", "127.0.0.2"
DATA = "{}.data"
"""Name of a worker's data port among links."""


@dataclass(frozen=True)
class Shape:
    prefill: int = 0
    decode: int = 0
    unified: int = 0
    transport: str = "shm"
    lease_seconds: float = 2.0
    kv_blocks: int = 256
    """So few that requests wait for some: a long prompt takes 96."""

    def __str__(self) -> str:
        if self.unified:
            return f"{self.unified} unified"
        return f"{self.prefill} prefill + {self.decode} decode, {self.transport}"


class FaultySystem:
    def __init__(self, shape: Shape, directory: Path, seed: int) -> None:
        self.shape = shape
        self._rng = random.Random(f"system {seed}")
        self._directory = directory
        self._metrics_ports: dict[str, int] = {}
        self._grpc_ports: dict[str, int] = {}
        self._openers: dict[str, asyncio.Task[None]] = {}
        self.parts: dict[str, Part] = {}
        self.proxies: dict[str, Proxy] = {}
        self._add_parts()

    # --- who is there

    @property
    def workers(self) -> list[str]:
        return [name for name in self.parts if name not in ("redis", "router")]

    def links(self) -> list[tuple[str, str]]:
        """(client, server), where faults can be."""
        pullers = [name for name in self.workers if name.startswith("decode")]
        sources = [name for name in self.workers if name.startswith("prefill")]
        return (
            [(name, "redis") for name in [*self.workers, "router"]]
            + [("router", worker) for worker in self.workers] * 2
            + [(puller, source) for puller in pullers for source in sources] * 2
            + [(p, DATA.format(s)) for p in pullers for s in sources if self.shape.transport == "tcp"] * 2
        )

    def client(self) -> Client:
        return Client(f"{REAL}:{self._grpc_ports['router']}")

    async def serves(self, seconds: float = 120.0) -> None:
        """Returns once every part is ready and the router is connected to all workers."""
        async with asyncio.timeout(seconds):
            for part in self.parts.values():
                await part.ready.wait()
            while await self.ready_workers() < len(self.workers):  # noqa: ASYNC110 - other processes set no event here
                await asyncio.sleep(0.1)

    async def ready_workers(self) -> int:
        page = await self.page("router")
        return int(sum_metric(page, "baton_workers", {"state": "ready"}))

    async def page(self, part: str) -> str:
        """Its /metrics, past all proxies."""
        timeout = aiohttp.ClientTimeout(total=10)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"http://{REAL}:{self._metrics_ports[part]}/metrics") as response,
        ):
            return await response.text()

    async def held(self) -> list[str]:
        """What an idle system must not have: blocks in use or unaccounted for, live transfers, requests."""
        found = [line for name in self.workers for line in held(name, await self.page(name), self.shape.kv_blocks)]
        if count := sum_metric(await self.page("router"), "baton_requests_open", {}):
            found.append(f"router: {count:.0f} requests open")
        return found

    def defects(self) -> list[str]:
        return [defect for part in self.parts.values() for defect in part.defects]

    # --- its life

    async def start(self) -> None:
        redis = self.parts["redis"]
        await redis.start()
        await self._open_proxy("redis", self._redis_port)
        for name, part in self.parts.items():
            if name != "redis":
                await part.start()
                self._openers[name] = asyncio.create_task(self._keep_data_proxy(part))
        for worker in self.workers:
            await self._open_proxy(worker, self._grpc_ports[worker])

    async def stop(self) -> None:
        for opener in self._openers.values():
            opener.cancel()
        for part in reversed(self.parts.values()):
            await part.end(signal.SIGKILL)
        for proxy in self.proxies.values():
            await proxy.close()

    def _add_parts(self) -> None:
        shape = self.shape
        names = [
            f"{role}-{number}"
            for role, count in (("prefill", shape.prefill), ("decode", shape.decode), ("unified", shape.unified))
            for number in range(count)
        ]
        ports = free_ports(self._rng, 2 * len(names) + 3, (REAL, PROXIED))
        self._redis_port, self._grpc_ports["router"], self._metrics_ports["router"] = ports[:3]
        redis_url = f"--redis-url=redis://{PROXIED}:{self._redis_port}/0"
        self.parts["redis"] = Redis(self._redis_port)
        for name, grpc_port, metrics_port in zip(names, ports[3::2], ports[4::2], strict=True):
            self._grpc_ports[name], self._metrics_ports[name] = grpc_port, metrics_port
            argv = [
                "prefill_worker" if name.startswith("prefill") else "decode_worker",
                f"--worker-id={name}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}", redis_url,
                f"--advertise-host={PROXIED}", f"--model={model_in_the_box.DIRECTORY}", "--dtype=float32",
                "--threads=1", f"--kv-blocks={shape.kv_blocks}", "--swap-space=0.1", f"--transport={shape.transport}",
                f"--lease-seconds={shape.lease_seconds}", "--heartbeat-seconds=0.5", "--drain-seconds=3",
                *(["--unified"] if name.startswith("unified") else []),
            ]  # fmt: skip
            self.parts[name] = Process(name, argv, self._directory / f"{name}.log")
        router = ["router", f"--grpc-port={ports[1]}", f"--http-port={ports[2]}", redis_url, "--local-prefill-tokens=0"]
        self.parts["router"] = Process("router", router, self._directory / "router.log")

    async def _open_proxy(self, name: str, port: int) -> None:
        proxy = Proxy((PROXIED, port), (REAL, port), self._who, self._rng)
        await proxy.start()
        self.proxies[name] = proxy

    async def _keep_data_proxy(self, part: Part) -> None:
        """The data server takes a port of its own at each start, which is found by looking."""
        name = DATA.format(part.name)
        while True:
            await part.ready.wait()
            pid = part.pid
            known = {self._grpc_ports[part.name], self._metrics_ports[part.name]}
            if pid is not None:
                for port in listening_ports(pid) - known:
                    await self._open_proxy(name, port)
            while part.ready.is_set() and part.pid == pid:  # noqa: ASYNC110 - it is a process that ends
                await asyncio.sleep(0.1)
            if name in self.proxies:
                await self.proxies.pop(name).close()

    def _who(self, address: tuple[str, int]) -> str:
        return owner(address, {name: part.pid for name, part in self.parts.items() if part.pid is not None})


def servers_of(worker: str) -> tuple[str, str]:
    """Names of its ports among links."""
    return worker, DATA.format(worker)


def held(worker: str, page: str, total: int) -> list[str]:
    """What its /metrics say that an idle worker must not have."""
    blocks = metric_by_label(page, "baton_kv_blocks", "state")
    busy = [state for state in ("active", "offered", "landing", "quarantined") if blocks[state]]
    found = [f"{worker}: {blocks[state]:.0f} blocks {state}" for state in busy]
    if sum(blocks.values()) != total:
        found.append(f"{worker}: {blocks} are not {total} blocks")
    transfers = metric_by_label(page, "baton_kv_transfers", "state")
    found += [f"{worker}: {count:.0f} transfers {state}" for state, count in transfers.items() if count]
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if count := sum_metric(page, name, {}):
            found.append(f"{worker}: {name} is {count:.0f}")
    return found


@asynccontextmanager
async def faulty_system(shape: Shape, directory: Path, seed: int) -> AsyncIterator[FaultySystem]:
    system = FaultySystem(shape, directory, seed)
    try:
        await system.start()
        await system.serves()
        yield system
    finally:
        await system.stop()


def tails(directory: Path, lines: int = 15) -> str:
    """The ends of all logs."""
    return "\n".join(
        f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
        for log in sorted(directory.glob("*.log"))
    )
