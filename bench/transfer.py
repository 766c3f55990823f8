"""`baton bench transfer`: what pulling blocks costs beside the plainest way of moving as many bytes.

Between two processes of this machine, as on two workers of one host. In every round all sides take turns with blocks
that have not been touched for as long as the pools are large, so that nothing is found in a cache. The plain sides
move one contiguous piece; pulls move blocks that lie scattered in both pools, in fetches of the size that a worker
makes, and verify them.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.config import parse
from baton.errors import ConfigError
from baton.flags import at_least, setting
from baton.ids import TransferId
from bench import results
from bench.figures import Figure, report
from bench.progress import bar
from bench.quiet import Quiet
from bench.transfer_source import GENERATION
from kvtransfer.gate import Gate
from kvtransfer.memory import HostMemory
from kvtransfer.source import CHECKSUM_BATCH_BYTES
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Connection, Fetched, Want
from kvtransfer.transports.shm import ShmConnection
from kvtransfer.transports.tcp import TcpConnection
from worker.copying import block_copier

RATE, SHARE = "moving blocks between two processes", "share of the plain way"
PLAIN = {"shm": "memcpy", "tcp": "bare socket"}
_SUMMED, _UNSUMMED = "pull", "pull without checksums"


@dataclass(frozen=True)
class TransferBenchConfig:
    """`baton bench transfer`: pulls by shm and tcp between two processes, beside memcpy and a bare socket."""

    blocks: int = setting(64, "blocks of one pull", **at_least(1))
    block_kib: int = setting(768, "KiB of one block", **at_least(1))
    pool_blocks: int = setting(512, "blocks of either pool; some pulls' worth, so that caches forget", **at_least(1))
    rounds: int = setting(40, "how often each side is measured; figures are medians", **at_least(1))
    out: str = setting("", "directory for JSON and plots; without it, none are written")


@dataclass(frozen=True)
class Source:
    """The other process."""

    pid: int
    fd: int
    nonce: bytes
    shm: bytes
    tcp: bytes
    bare: int
    """A port."""
    transfer_id: TransferId
    checksums: Sequence[int]


Side = Callable[[Sequence[int], Sequence[int]], Awaitable[None]]
"""Moves the blocks of the first sequence to the places in the second."""


def main(argv: Sequence[str]) -> int:
    config = parse(TransferBenchConfig, argv, prog="baton bench transfer")
    if config.pool_blocks < config.blocks:
        raise ConfigError(
            f"--pool-blocks is {config.pool_blocks}; a pull of --blocks={config.blocks} needs as many at least"
        )
    if config.out:
        results.check_plots()
    with _source(config) as source:
        rates = asyncio.run(_measure(config, source))
    measured = figures(rates)
    print(report(measured))
    if config.out:
        content = results.circumstances() | {
            "config": {name: value for name, value in asdict(config).items() if name != "out"}
        }
        for path in results.write(Path(config.out), "transfer", content, measured):
            print(f"wrote {path}", file=sys.stderr)
    return 0


@contextmanager
def _source(config: TransferBenchConfig) -> Iterator[Source]:
    sizes = (config.pool_blocks, config.block_kib << 10, config.blocks)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.transfer_source", *map(str, sizes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        told: dict[str, Any] = json.loads(process.stdout.readline())
        yield Source(
            process.pid,
            told["fd"],
            bytes.fromhex(told["nonce"]),
            bytes.fromhex(told["shm"]),
            bytes.fromhex(told["tcp"]),
            told["bare"],
            TransferId(bytes.fromhex(told["transfer_id"])),
            told["checksums"],
        )
        process.stdin.close()


async def _measure(config: TransferBenchConfig, source: Source) -> dict[str, list[float]]:
    """GB/s of each side, a value a round."""
    threads, quiet = Threads.create(), Quiet()
    memory = HostMemory.create(config.pool_blocks, config.block_kib << 10)
    memory.populate().join()
    shm = await ShmConnection.connect(source.shm, memory, threads.memory, block_copier(memory))
    tcp = TcpConnection.connect(source.tcp, memory, threads.network)
    mapped = HostMemory.attach(source.pid, source.fd, source.nonce)
    with closing(socket.create_connection(("127.0.0.1", source.bare))) as bare:
        sides: dict[str, Side] = {
            "memcpy": lambda _, to: _plain_copy(mapped, memory, to, 1),
            "memcpy, two threads": lambda _, to: _plain_copy(mapped, memory, to, 2),
            "bare socket": lambda _, to: _plain_receive(bare, memory, to),
            f"shm {_SUMMED}": _puller(shm, source, memory, summed=True),
            f"shm {_UNSUMMED}": _puller(shm, source, memory, summed=False),
            f"tcp {_SUMMED}": _puller(tcp, source, memory, summed=True),
            f"tcp {_UNSUMMED}": _puller(tcp, source, memory, summed=False),
        }
        rates = await _take_turns(config, sides, quiet)
    await shm.close()
    await tcp.close()
    threads.close()
    return rates


async def _take_turns(config: TransferBenchConfig, sides: dict[str, Side], quiet: Quiet) -> dict[str, list[float]]:
    draw, turns = random.Random(0), Turns(config.blocks, config.pool_blocks)
    size = config.blocks * config.block_kib << 10
    rates: dict[str, list[float]] = {side: [] for side in sides}
    quiet()
    with bar(config.rounds, "round") as progress:
        for number in range(config.rounds + 1):  # the first warms up
            names = list(sides)
            draw.shuffle(names)  # lest one side always finds what the same other one leaves behind
            for name in names:
                sources, destinations = turns.next()
                started = time.perf_counter()
                await sides[name](sources, destinations)
                seconds = time.perf_counter() - started
                if number:
                    rates[name].append(size / seconds / 1e9)
            progress.advance("transfer")
    return rates


class Turns:
    """Which blocks move next, in a random order: those that have rested longest. The plain sides begin at the first."""

    def __init__(self, blocks: int, pool_blocks: int, seed: int = 1) -> None:
        self._blocks, self._pool_blocks = blocks, pool_blocks
        self._draw = random.Random(seed)
        self._at = 0

    def next(self) -> tuple[list[int], list[int]]:
        """Places in the source's pool and in the puller's."""
        sources = list(range(self._at, self._at + self._blocks))
        self._at += self._blocks
        if self._at + self._blocks > self._pool_blocks:
            self._at = 0
        destinations = list(sources)
        self._draw.shuffle(sources)
        self._draw.shuffle(destinations)
        return sources, destinations


async def _plain_copy(source: HostMemory, memory: HostMemory, places: Sequence[int], num_threads: int) -> None:
    first, share = min(places), -(-len(places) // num_threads)
    pieces = [(source.view(at, share), memory.view(at, share)) for at in range(first, first + len(places), share)]
    threads = [threading.Thread(target=_memcpy, args=piece) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _memcpy(data: memoryview, target: memoryview) -> None:
    """numpy's copy is memcpy, without the interpreter lock."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))


async def _plain_receive(bare: socket.socket, memory: HostMemory, places: Sequence[int]) -> None:
    into = memory.view(min(places), len(places))
    bare.sendall(min(places).to_bytes(4, "little"))
    while into:
        into = into[bare.recv_into(into) :]


def _puller(connection: Connection, source: Source, memory: HostMemory, *, summed: bool) -> Side:
    batch = max(1, min(connection.fetch_bytes, CHECKSUM_BATCH_BYTES[memory.checksum_kind]) // memory.block_bytes)

    async def fetch(wants: Sequence[Want], gate: Gate) -> None:
        async with connection.slots:
            landed = await connection.fetch(source.transfer_id, wants, gate)
        assert landed == [Fetched.LANDED] * len(wants), landed

    async def pull(sources: Sequence[int], destinations: Sequence[int]) -> None:
        wants = [
            Want(s, GENERATION, d, source.checksums[s] if summed else None)
            for s, d in zip(sources, destinations, strict=True)
        ]
        gate = Gate()
        await asyncio.gather(*(fetch(wants[at : at + batch], gate) for at in range(0, len(wants), batch)))

    return pull


def figures(rates: dict[str, list[float]]) -> list[Figure]:
    """Rates, and shares of turns in the same round."""
    found = [Figure(RATE, side, "baton", "GB/s", tuple(runs), more_is_better=True) for side, runs in rates.items()]
    of = [(f"{name} {_SUMMED}", plain) for name, plain in PLAIN.items()]
    of.append((f"shm {_SUMMED}", "memcpy, two threads"))
    of += [(f"{name} {_SUMMED}", f"{name} {_UNSUMMED}") for name in PLAIN]
    for side, other in of:
        shares = tuple(100 * a / b for a, b in zip(rates[side], rates[other], strict=True))
        found.append(Figure(SHARE, f"{side} : {other}", "baton", "%", shares, more_is_better=True))
    return found
