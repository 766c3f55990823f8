"""The source as a process of its own: it works, it is killed with -9, it is stopped, it comes back. All of it for what
is moved as it is, and for what is re-laid."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

import pytest
import torch

from baton.clock import MonotonicClock
from baton.errors import HandoffFailed, LeaseExpired, PeerLost
from baton.ids import AttemptId, BlockRef
from baton.layout import KVLayout
from baton.metrics import Metrics, TransferMetrics
from baton.v1 import transfer_pb2 as pb
from kvtransfer import DestinationState, HostMemory, Puller, Ticket
from kvtransfer.threads import Threads
from kvtransfer.transports.chooser import Connector
from tests.kvtransfer.rig import LAYOUT, PULLER_ID, holds, pattern, take, until
from tests.kvtransfer.source_process import FIRST_TOKEN, NUM_BLOCKS, lease_seconds
from tests.kvtransfer.transport_rigs import RIGS

ROOT = Path(__file__).resolve().parents[2]


class Source:
    """The process, and its ticket."""

    def __init__(self, transport: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvtransfer.source_process", transport],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ticket = Ticket.from_proto(pb.Ticket.FromString(bytes.fromhex(self.stdout.readline())))

    @property
    def stdout(self) -> IO[str]:
        return cast("IO[str]", self.process.stdout)

    def seal(self, end: int) -> None:
        stdin = cast("IO[str]", self.process.stdin)
        stdin.write(f"{end}\n")
        stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@dataclass
class Pulling:
    puller: Puller
    connector: Connector
    memory: HostMemory
    layout: KVLayout

    def reserve(self) -> list[BlockRef]:
        return take(self.memory, range(NUM_BLOCKS))

    def holds(self, refs: Sequence[BlockRef], source: Sequence[BlockRef]) -> bool:
        if self.layout == LAYOUT:
            return holds(self.memory, refs, source)
        return all(
            bytes(self.memory.read(ref.index)) == converted(pattern(origin.index, origin.generation))
            for ref, origin in zip(refs, source, strict=True)
        )

    @property
    def stages(self) -> bool:
        return self.layout != LAYOUT


def converted(block: bytes) -> bytes:
    """float32 to bfloat16."""
    return torch.frombuffer(bytearray(block), dtype=torch.float32).bfloat16().view(torch.uint8).numpy().tobytes()


@asynccontextmanager
async def pulling(transport: str, dtype: str) -> AsyncIterator[Pulling]:
    layout = replace(LAYOUT, dtype=dtype)
    memory, threads = HostMemory.create(64, layout.block_bytes), Threads.create()
    connector = Connector(memory, threads, setting=transport)
    puller = Puller(
        memory=memory,
        layout=layout,
        worker_id=PULLER_ID,
        connector=connector,
        threads=threads,
        clock=MonotonicClock(),
        metrics=TransferMetrics(Metrics()),
    )
    yield Pulling(puller, connector, memory, layout)
    await puller.close()
    threads.close()


@pytest.fixture(params=["shm", "tcp", "nixl"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if missing := RIGS[request.param].missing():
        pytest.skip(missing)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return str(request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """The puller's; the source's is float32."""
    return str(request.param)


@pytest.fixture
def source(transport: str) -> Iterator[Source]:
    gc.collect()  # what other tests left in cycles still maps their pools. Before the offer: its lease runs meanwhile
    source = Source(transport)
    yield source
    source.end()


def mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:baton-kv")


async def test_two_processes_hand_over(source: Source, transport: str, dtype: str) -> None:
    async with pulling(transport, dtype) as pull:
        reserved = pull.reserve()
        landing = pull.puller.land(source.ticket, source.ticket.id, reserved, 0)
        source.seal(25)
        source.seal(-1)
        landed = await landing.done()
        assert (landed.first_token, landed.blocks, landed.transport) == (FIRST_TOKEN, NUM_BLOCKS, transport)
        assert pull.holds(reserved, source.ticket.blocks)
        assert await asyncio.to_thread(source.stdout.readline) == "ended req-1#0\n"


async def test_kill_9_of_the_source_in_mid_pull_ends_in_an_error_and_frees_everything(
    source: Source, transport: str, dtype: str
) -> None:
    async with pulling(transport, dtype) as pull:
        pools = mapped_pools()
        reserved = pull.reserve()
        landing = pull.puller.land(source.ticket, source.ticket.id, reserved, 0)
        source.seal(25)
        await until(lambda: pull.holds(reserved[:25], source.ticket.blocks[:25]))
        assert pull.puller.counts() == {DestinationState.LANDING: 1}
        assert mapped_pools() == pools + (transport == "shm") + pull.stages
        source.signal(signal.SIGKILL)
        async with asyncio.timeout(5):
            with pytest.raises(PeerLost, match="prefill-0 at 127"):
                await landing.done()
            await landing.drained()
        assert landing.state is DestinationState.FREE
        assert pull.puller.counts() == {}
        source.process.wait(5)
        await pull.puller._arrivals.sweep()
        assert mapped_pools() == pools + pull.stages  # or the dead process's pool would stay in memory
        again = Source(transport)  # comes back, as another incarnation, elsewhere
        try:
            again.seal(-1)
            reserved = pull.reserve()
            assert (await pull.puller.pull(again.ticket, again.ticket.id, reserved, 0)).blocks == NUM_BLOCKS
            assert pull.holds(reserved, again.ticket.blocks)
        finally:
            again.end()


async def test_a_stopped_source_costs_one_lease_and_what_it_does_later_reaches_nobody(
    source: Source, transport: str, dtype: str
) -> None:
    async with pulling(transport, dtype) as pull:
        reserved = pull.reserve()
        landing = pull.puller.land(source.ticket, source.ticket.id, reserved, 0)
        source.seal(25)
        await until(lambda: pull.holds(reserved[:25], source.ticket.blocks[:25]))
        source.signal(signal.SIGSTOP)
        with pytest.raises(LeaseExpired, match=rf"did not answer within the lease of {lease_seconds(transport):g} s"):
            await landing.done()
        await landing.drained()
        pull.memory.blocks[:] = b"n" * len(pull.memory.blocks)  # the blocks' next user
        source.signal(signal.SIGCONT)
        source.seal(-1)
        assert await asyncio.to_thread(source.stdout.readline) == "ended req-1#0\n"
        with pytest.raises(HandoffFailed, match="refused"):
            await pull.puller.pull(source.ticket, AttemptId("req-1", 0), pull.reserve(), 0)
        assert set(pull.memory.blocks) == {ord("n")}
