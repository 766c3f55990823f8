"""A transport without a network, for tests and the simulator: it delays, reorders, duplicates, corrupts and dies.

All of it is drawn from one seed and waits through `sleep`, so that under virtual time a seed replays a failure exactly.
It keeps the contract of base.Connection, with one writer that the others do not have: after a fetch was cancelled or
broke, a write of it may still be under way and lands later, as a network card's would. The gate counts it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from baton.errors import PeerLost, TransferRefused
from baton.ids import TransferId
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import PoolMemory
from kvtransfer.transports.base import Endpoint, Fetched, Want, landed_right

NAME = "fake"
_FETCHES = 4  # at once


@dataclass(frozen=True)
class Faults:
    """Probabilities are per block, in [0, 1]; durations are in seconds."""

    delay: float = 0.0
    """Longest delay of one block; drawn evenly from 0."""
    corrupt: float = 0.0
    """A bit flips on the way."""
    duplicate: float = 0.0
    """Written a second time, after the first, within the fetch."""
    drop: float = 0.0
    """Never arrives: the fetch breaks after `timeout`."""
    straggle: float = 0.0
    """When the fetch breaks, the write of this block is still under way, and lands later."""
    straggle_delay: float | None = None
    """How much later; None: `delay`."""
    timeout: float = 1.0


@dataclass
class FakeNetwork:
    """All sources that can be reached, by name."""

    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    is_cut: Callable[[str, PoolMemory], bool] = lambda name, memory: False
    """Whether nothing gets from the source of that name into that memory."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._sources: dict[str, FakeSource] = {}
        self._stragglers: set[asyncio.Task[None]] = set()

    def add(self, name: str, memory: PoolMemory, permits: ReadPermits) -> FakeSource:
        source = self._sources[name] = FakeSource(name, memory, permits)
        return source

    def find(self, name: str) -> FakeSource | None:
        return self._sources.get(name)

    def connect(self, address: bytes, memory: PoolMemory) -> FakeConnection:
        """Raises TransferRefused where nobody has this name, or its blocks are of another size."""
        name = address.decode("utf-8", "replace")
        source = self._sources.get(name)
        if source is None:
            raise TransferRefused(f"there is no fake source {name[:64]!r}")
        if source.block_bytes != memory.block_bytes:
            raise TransferRefused(
                f"the source's blocks have {source.block_bytes} bytes, this pool's {memory.block_bytes}"
            )
        return FakeConnection(self, name, memory)

    def straggle(self, write: Callable[[], None], gate: Gate) -> None:
        """Lets `write` happen later. The caller has entered `gate` for it."""
        task = asyncio.get_running_loop().create_task(self._write_late(write, gate))
        self._stragglers.add(task)
        task.add_done_callback(self._stragglers.discard)

    async def _write_late(self, write: Callable[[], None], gate: Gate) -> None:
        try:
            late = self.faults.straggle_delay
            await self.sleep(self.faults.delay if late is None else late)
            write()
        finally:
            gate.leave()


class FakeSource:
    """One source's side."""

    def __init__(self, name: str, memory: PoolMemory, permits: ReadPermits) -> None:
        self._name = name
        self._memory = memory
        self._permits = permits
        self.dead = False
        self.frozen = False
        """Answers nothing, and is not known to be dead: like a stopped process."""

    @property
    def block_bytes(self) -> int:
        return self._memory.block_bytes

    def endpoint(self) -> Endpoint:
        return Endpoint(NAME, self._name.encode())

    def die(self) -> None:
        self.dead = True

    def permit(self, transfer_id: TransferId) -> ReadPermit | None:
        return self._permits.get(transfer_id)

    def read(self, permit: ReadPermit, want: Want) -> tuple[Fetched, bytes]:
        """A block's bytes as they are now."""
        with permit.gate.passing() as admitted:
            if not admitted:
                return Fetched.REFUSED, b""
            if not permit.covers(want.source, want.generation):
                return Fetched.REFUSED, b""
            if self._memory.generation(want.source) != want.generation:
                return Fetched.STALE, b""
            data = bytes(self._memory.read(want.source))
            same = self._memory.generation(want.source) == want.generation
            return (Fetched.LANDED if same else Fetched.STALE), data


class FakeConnection:
    fetch_bytes = 8 << 20

    def __init__(self, network: FakeNetwork, name: str, memory: PoolMemory) -> None:
        self._network = network
        self._name = name
        self._memory = memory
        self._closed = False
        self.slots = asyncio.Semaphore(_FETCHES)

    @property
    def alive(self) -> bool:
        source = self._network.find(self._name)
        return not self._closed and source is not None and not source.dead

    async def fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        network, faults = self._network, self._network.faults
        source = network.find(self._name)
        if source is None or source.dead or self._closed:
            raise PeerLost(f"fake source {self._name} is gone")
        permit = source.permit(transfer_id)
        if permit is None:
            raise TransferRefused(f"fake source {self._name} knows of no such claimed block set (any more)")
        results = [Fetched.LANDED] * len(wants)
        order = list(range(len(wants)))
        network.random.shuffle(order)
        again: list[tuple[Want, bytes]] = []
        for at in order:
            with gate.passing() as admitted:
                if not admitted:
                    raise TransferRefused("the landing was given up")
                want = wants[at]
                results[at], data = source.read(permit, want)
                try:
                    await self._travel(source)
                except BaseException:
                    if results[at] is Fetched.LANDED:
                        self._maybe_straggle(want, data, gate)
                    raise
                if results[at] is not Fetched.LANDED:
                    continue
                data = self._maybe_corrupt(data)
                self._memory.write(want.destination, memoryview(data))
                if network.random.random() < faults.duplicate:
                    again.append((want, data))
        for want, data in again:
            with gate.passing() as admitted:
                if admitted:
                    await network.sleep(network.random.uniform(0, faults.delay))
                    self._memory.write(want.destination, memoryview(data))
        landed = [at for at, result in enumerate(results) if result is Fetched.LANDED]
        for at, good in zip(landed, landed_right(self._memory, [wants[at] for at in landed]), strict=True):
            results[at] = Fetched.LANDED if good else Fetched.DAMAGED
        return results

    async def close(self) -> None:
        self._closed = True

    async def _travel(self, source: FakeSource) -> None:
        """Takes the time that a block takes. Raises PeerLost where it never arrives."""
        network, faults = self._network, self._network.faults
        await network.sleep(network.random.uniform(0, faults.delay))
        if source.frozen or network.is_cut(self._name, self._memory) or network.random.random() < faults.drop:
            await network.sleep(faults.timeout)
            raise PeerLost(f"fake source {self._name} fell silent")
        if source.dead or self._closed:
            raise PeerLost(f"fake source {self._name} died")

    def _maybe_straggle(self, want: Want, data: bytes, gate: Gate) -> None:
        """Inside the gate still, so that it can be entered once more for the late write even if it was closed."""
        if self._network.random.random() < self._network.faults.straggle:
            gate.stay()
            self._network.straggle(lambda: self._memory.write(want.destination, memoryview(data)), gate)

    def _maybe_corrupt(self, data: bytes) -> bytes:
        draw = self._network.random
        if draw.random() >= self._network.faults.corrupt:
            return data
        flipped = bytearray(data)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
