"""What a seed decides, as plain data: the system, the requests, the faults and all delays. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
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
    block_size: int
    max_model_len: int
    lease_seconds: float
    local_prefill_tokens: int
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
        """Nothing goes wrong: so every request has to be answered in full."""
        chances = (self.transport_corrupt, self.transport_drop, self.delays.slow_share, self.delays.repeat_share)
        return not self.faults and not any(chances)

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


def make_scenario(seed: int) -> Scenario:
    draw = Random(f"scenario {seed}")
    block_size = draw.choice((1, 2, 4, 8))
    max_model_len = block_size * draw.randint(max(2, 16 // block_size), max(4, 48 // block_size))
    calm = draw.random() < 0.1
    lossy = not calm and draw.random() < 0.4
    drifts = draw.random() < 0.3
    workers = _workers(draw, block_size, max_model_len, drifts)
    routers = tuple(
        RouterSpec(f"router-{number}", _rate(draw, drifts)) for number in range(draw.choice((1, 1, 2)))
    )  # fmt: skip
    slow_share = 0.0 if calm else draw.choice((0.0, 0.01, 0.05))
    return Scenario(
        seed=seed,
        block_size=block_size,
        max_model_len=max_model_len,
        lease_seconds=draw.choice((0.5, 1.0, 3.0)) if not calm else 5.0,
        local_prefill_tokens=draw.choice((0, 0, 4, 16)),
        delays=Delays(
            usual=draw.choice((0.001, 0.01, 0.05)),
            slow=draw.choice((0.1, 1.0, 4.0)),
            slow_share=slow_share,
            thread=draw.choice((0.001, 0.02)),
            repeat_share=0.0 if calm else draw.choice((0.0, 0.0, 0.0, 0.05)),
        ),
        transport_delay=draw.choice((0.0005, 0.005, 0.05)),
        transport_corrupt=draw.choice((0.0, 0.02, 0.2)) if lossy else 0.0,
        transport_drop=draw.choice((0.0, 0.02, 0.1)) if lossy else 0.0,
        transport_duplicate=draw.choice((0.0, 0.2)),
        transport_straggle=draw.choice((0.0, 0.5)),
        transport_straggle_delay=draw.choice((0.05, 0.5, 2.0)),
        workers=workers,
        routers=routers,
        requests=_requests(draw, max_model_len, calm, routers),
        faults=() if calm else _faults(draw, workers, routers),
    )


def _rate(draw: Random, drifts: bool) -> float:
    return draw.uniform(0.995, 1.005) if drifts else 1.0


def _workers(draw: Random, block_size: int, max_model_len: int, drifts: bool) -> tuple[WorkerSpec, ...]:
    shape = draw.choice(((1, 1, 0), (1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 1, 1), (0, 0, 2), (0, 2, 0)))
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.UNIFIED)
    smallest = max_model_len // block_size
    specs = []
    for role, count in zip(roles, shape, strict=True):
        for number in range(count):
            seqs = draw.choice((2, 4, 8))
            specs.append(
                WorkerSpec(
                    id=f"{role.value}-{number}",
                    role=role,
                    # Mostly so few that two streams which grow do not fit.
                    num_blocks=smallest + draw.choice((0, 1, smallest // 2, smallest, 4 * smallest)),
                    num_swap_slots=draw.choice((0, smallest, 4 * smallest)),
                    max_num_seqs=seqs,
                    max_num_batched_tokens=max(seqs, draw.choice((8, 16, 64))),
                    itl_objective_seconds=draw.choice((inf, inf, inf, 0.05)),
                    steps=StepTimes(
                        base=draw.choice((0.005, 0.02, 0.1)),
                        per_token=draw.choice((0.0, 0.0005, 0.005)),
                        move=draw.choice((0.0001, 0.002)),
                        hop=draw.choice((0.0002, 0.004)),
                    ),
                    clock_rate=_rate(draw, drifts),
                )
            )
    return tuple(specs)


def _requests(
    draw: Random, max_model_len: int, calm: bool, routers: tuple[RouterSpec, ...]
) -> tuple[RequestSpec, ...]:  # fmt: skip
    prefixes = [_tokens(draw, draw.randint(1, max_model_len - 2)) for _ in range(draw.randint(1, 3))]
    cancels = draw.choice((0.0, 0.2, 0.9))
    long_answers = draw.random() < 0.5
    burst = draw.choice((0.3, 0.3, 0.02))
    salts = draw.choice(((b"",), (b"", b"tenant")))
    requests = []
    for number in range(draw.randint(3, 12)):
        prefix = draw.choice(prefixes) if draw.random() < 0.7 else ()
        whole = prefix + _tokens(draw, draw.randint(1, max_model_len))
        prompt = whole[: draw.randint(1, max_model_len // 2 if long_answers else max_model_len - 1)]
        left = max_model_len - len(prompt)
        requests.append(
            RequestSpec(
                name=f"r{number}",
                router=draw.choice(routers).id,
                salt=draw.choice(salts),
                at=draw.uniform(1.0, LOAD_SECONDS) if draw.random() < 0.4 else draw.uniform(1.0, 1.0 + burst),
                prompt=prompt,
                max_tokens=left if long_answers else draw.randint(1, left),
                timeout=None if calm or draw.random() < 0.7 else draw.uniform(0.01, 6.0),
                cancel_after=draw.uniform(0.0, 0.5) if draw.random() < cancels else None,
            )
        )
    return tuple(sorted(requests, key=lambda request: request.at))


def last_requests(scenario: Scenario, at: float) -> tuple[RequestSpec, ...]:
    """One by each router when all faults are over, as long as any may be: whoever is left must still serve it."""
    draw = Random(f"last {scenario.seed}")
    return tuple(
        RequestSpec(
            name=f"last-{router.id}",
            router=router.id,
            at=at,
            salt=b"",
            prompt=_tokens(draw, scenario.max_model_len - 2),
            max_tokens=2,
            timeout=None,
            cancel_after=None,
        )
        for router in scenario.routers
    )


def _tokens(draw: Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(16, 1000) for _ in range(count))


_KINDS = {
    FaultKind.CRASH: 3,
    FaultKind.PAUSE: 3,
    FaultKind.DRAIN: 2,
    FaultKind.CLOCK_JUMP: 1,
    FaultKind.PARTITION: 2,
    FaultKind.BREAK: 4,
    FaultKind.REDIS_AWAY: 1,
    FaultKind.REDIS_SLOW: 1,
    FaultKind.REDIS_LIES: 1,
    FaultKind.REDIS_EMPTY: 1,
}
"""How often each, beside the others."""


def _faults(draw: Random, workers: tuple[WorkerSpec, ...], routers: tuple[RouterSpec, ...]) -> tuple[Fault, ...]:
    kinds = [kind for kind, weight in _KINDS.items() for _ in range(weight)]
    at_routers = {router.id for router in routers}
    places = [worker.id for worker in workers for _ in range(3)] + sorted(at_routers)
    faults = []
    for _ in range(draw.choice((0, 1, 2, 4, 8, 16))):
        kind = draw.choice(kinds)
        target = draw.choice(places)
        other = draw.choice([place for place in (*places, CLIENTS, REDIS) if place != target])
        # A good part early on, when most requests are under way.
        at = draw.uniform(1.0, LOAD_SECONDS) if draw.random() < 0.4 else draw.uniform(1.0, 2.0)
        seconds = draw.choice((0.02, 0.3, 2.0, 2.0, 6.0, 15.0)) * draw.uniform(0.5, 1.5)
        if target in at_routers and kind is FaultKind.CRASH:
            seconds = min(seconds, 1.0)  # whoever asks meanwhile is told so at once, and that is all
        if kind is FaultKind.CLOCK_JUMP:
            seconds = draw.choice((0.3, 2.0, 5.0)) * draw.uniform(0.5, 1.5)
        faults.append(Fault(at, kind, seconds, target, other, draw.randrange(1 << 16), draw.random() < 0.3))
    return tuple(sorted(faults, key=lambda fault: fault.at))
