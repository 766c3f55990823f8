"""A scenario, as plain data: the system, the requests, the faults and all delays. Pure; sim/seed.py draws it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random

from discovery.records import WorkerRole
from sim.engine_driver import StepTimes

LOAD_SECONDS = 8.0
"""In which requests arrive and faults happen."""
CLIENTS = "clients"
"""The place where they all are."""
REDIS = "redis"


@dataclass(frozen=True)
class WorkerSpec:
    id: str
    role: WorkerRole
    block_size: int
    num_blocks: int
    num_swap_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    itl_objective_seconds: float
    steps: StepTimes
    clock_rate: float


@dataclass(frozen=True)
class RouterSpec:
    id: str
    clock_rate: float


@dataclass(frozen=True)
class RequestSpec:
    name: str
    router: str
    at: float
    salt: bytes
    """Its tenant's."""
    prompt: tuple[int, ...]
    max_tokens: int
    timeout: float | None
    cancel_after: float | None


class FaultKind(Enum):
    CRASH = "crash"
    """SIGKILL, and a restart under the same id and address after `seconds`."""
    PAUSE = "pause"
    """SIGSTOP, and SIGCONT after `seconds`."""
    DRAIN = "drain"
    """SIGTERM: it ends what it has, within `seconds`, and starts again."""
    CLOCK_JUMP = "clock jump"
    """Its monotonic clock jumps `seconds` ahead, as behind a suspended machine's sleep."""
    PARTITION = "partition"
    """Two places don't hear each other for `seconds`."""
    BREAK = "break"
    """A stream that is under way breaks."""
    REDIS_AWAY = "redis away"
    """Answers nobody for `seconds`."""
    REDIS_SLOW = "redis slow"
    """Answers late for `seconds`."""
    REDIS_LIES = "redis lies"
    """Answers nonsense for `seconds`."""
    REDIS_EMPTY = "redis empty"
    """Has lost all that it knew."""


OF_REDIS = (FaultKind.REDIS_AWAY, FaultKind.REDIS_SLOW, FaultKind.REDIS_LIES, FaultKind.REDIS_EMPTY)


@dataclass(frozen=True)
class Fault:
    at: float
    kind: FaultKind
    seconds: float
    target: str = ""
    """A place, for those that happen at one."""
    other: str = ""
    number: int = 0
    """Which stream, modulo how many there are."""
    hard: bool = False
    """A crash of which the peers' kernels hear nothing; a partition behind which streams are reset."""

    @property
    def places(self) -> frozenset[str]:
        return frozenset(filter(None, (self.target, self.other)))


@dataclass(frozen=True)
class Delays:
    """Seconds."""

    usual: float
    slow: float
    slow_share: float
    thread: float
    repeat_share: float = 0.0
    """Of the messages on a stream between two of ours that arrive twice."""

    @property
    def longest(self) -> float:
        return self.slow if self.slow_share else self.usual

    def network(self, draw: Random) -> float:
        if draw.random() < self.slow_share:
            return draw.uniform(0, self.slow)
        return draw.uniform(0.00005, self.usual)


@dataclass(frozen=True)
class Scenario:
    seed: int
    max_model_len: int
    lease_seconds: float
    local_prefill_tokens: int
    fetch_prefix_tokens: int
    delays: Delays
    transport_delay: float
    transport_corrupt: float
    transport_drop: float
    transport_duplicate: float
    transport_straggle: float
    transport_straggle_delay: float
    workers: tuple[WorkerSpec, ...]
    routers: tuple[RouterSpec, ...]
    requests: tuple[RequestSpec, ...]
    faults: tuple[Fault, ...]

    @property
    def is_calm(self) -> bool:
        """Nothing goes wrong: so nothing may be tried twice."""
        return self.must_succeed and not self.faults

    @property
    def must_succeed(self) -> bool:
        """Nothing goes wrong but what Redis says, which is hints: so every request has to be answered in full."""
        chances = (self.transport_corrupt, self.transport_drop, self.delays.slow_share, self.delays.repeat_share)
        return not any(chances) and all(f.kind in OF_REDIS or REDIS in f.places for f in self.faults)

    @property
    def clocks_agree(self) -> bool:
        """Nobody's deadline comes early."""
        rates = {worker.clock_rate for worker in self.workers} | {router.clock_rate for router in self.routers}
        return rates == {1.0} and all(fault.kind is not FaultKind.CLOCK_JUMP for fault in self.faults)

    @property
    def places(self) -> tuple[str, ...]:
        return (*(worker.id for worker in self.workers), *(router.id for router in self.routers))

    @property
    def over_at(self) -> float:
        """When the last fault has passed."""
        return max((fault.at + fault.seconds for fault in self.faults), default=0.0)
