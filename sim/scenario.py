"""What a seed decides, as plain data: the system, the requests, the faults and all delays. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from random import Random

from discovery.records import WorkerRole
from sim.engine_driver import StepTimes

LOAD_SECONDS = 8.0
"""In which requests arrive and faults happen."""


@dataclass(frozen=True)
class WorkerSpec:
    id: str
    role: WorkerRole
    block_size: int
    num_blocks: int
    num_swap_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    steps: StepTimes


@dataclass(frozen=True)
class RequestSpec:
    name: str
    at: float
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
    BREAK = "break"
    """A stream that is under way breaks."""
    REDIS_AWAY = "redis away"
    """Answers nobody for `seconds`."""
    REDIS_EMPTY = "redis empty"
    """Has lost all that it knew."""


@dataclass(frozen=True)
class Fault:
    at: float
    kind: FaultKind
    target: int
    """Which worker, or which stream, by number modulo how many there are."""
    seconds: float
    silently: bool = False
    """A crash of which the peers' kernels hear nothing."""


@dataclass(frozen=True)
class Delays:
    """Seconds."""

    usual: float
    slow: float
    slow_share: float
    thread: float

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
    delays: Delays
    transport_delay: float
    transport_corrupt: float
    transport_drop: float
    transport_duplicate: float
    transport_straggle: float
    transport_straggle_delay: float
    workers: tuple[WorkerSpec, ...]
    requests: tuple[RequestSpec, ...]
    faults: tuple[Fault, ...]

    @property
    def is_calm(self) -> bool:
        """Nothing goes wrong: so every request has to be answered in full."""
        return not self.faults and not self.transport_corrupt and not self.transport_drop and not self.delays.slow_share


def make_scenario(seed: int) -> Scenario:
    draw = Random(f"scenario {seed}")
    block_size = draw.choice((1, 2, 4, 8))
    max_model_len = block_size * draw.randint(max(2, 16 // block_size), max(4, 48 // block_size))
    calm = draw.random() < 0.1
    lossy = not calm and draw.random() < 0.4
    workers = _workers(draw, block_size, max_model_len)
    slow_share = 0.0 if calm else draw.choice((0.0, 0.01, 0.05))
    return Scenario(
        seed=seed,
        max_model_len=max_model_len,
        lease_seconds=draw.choice((0.5, 1.0, 3.0)) if not calm else 5.0,
        local_prefill_tokens=draw.choice((0, 0, 4, 16)),
        delays=Delays(draw.choice((0.001, 0.01)), draw.choice((0.1, 1.0, 4.0)), slow_share, draw.choice((0.001, 0.02))),
        transport_delay=draw.choice((0.0005, 0.005, 0.05)),
        transport_corrupt=draw.choice((0.0, 0.02, 0.2)) if lossy else 0.0,
        transport_drop=draw.choice((0.0, 0.02, 0.1)) if lossy else 0.0,
        transport_duplicate=draw.choice((0.0, 0.2)),
        transport_straggle=draw.choice((0.0, 0.5)),
        transport_straggle_delay=draw.choice((0.05, 0.5, 2.0)),
        workers=_with_other_block_sizes(seed, workers, max_model_len),
        requests=_requests(draw, max_model_len, calm),
        faults=() if calm else _faults(draw),
    )


def _workers(draw: Random, block_size: int, max_model_len: int) -> tuple[WorkerSpec, ...]:
    shape = draw.choice(((1, 1, 0), (1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 1, 1), (0, 0, 2), (0, 2, 0)))
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.UNIFIED)
    smallest = max_model_len // block_size
    specs = []
    for role, count in zip(roles, shape, strict=True):
        for number in range(count):
            seqs = draw.choice((2, 4, 8))
            steps = StepTimes(draw.choice((0.002, 0.01, 0.1)), draw.choice((0.0, 0.0005)), draw.choice((0.0002, 0.004)))
            specs.append(
                WorkerSpec(
                    id=f"{role.value}-{number}",
                    role=role,
                    block_size=block_size,
                    num_blocks=smallest + draw.choice((0, 1, smallest, 4 * smallest)),
                    num_swap_slots=draw.choice((0, smallest, 4 * smallest)),
                    max_num_seqs=seqs,
                    max_num_batched_tokens=max(seqs, draw.choice((8, 16, 64))),
                    steps=steps,
                )
            )
    return tuple(specs)


def _with_other_block_sizes(seed: int, workers: tuple[WorkerSpec, ...], max_model_len: int) -> tuple[WorkerSpec, ...]:
    """Of one system in four: as much room as before, in blocks of any size, so that what is handed over is re-laid."""
    draw = Random(f"block sizes {seed}")
    if draw.random() >= 0.25:
        return workers
    return tuple(_with_block_size(spec, draw.choice((1, 2, 3, 4, 8)), max_model_len) for spec in workers)


def _with_block_size(spec: WorkerSpec, size: int, max_model_len: int) -> WorkerSpec:
    def blocks(before: int) -> int:
        return -(-before * spec.block_size // size)

    return replace(
        spec,
        block_size=size,
        num_blocks=max(blocks(spec.num_blocks), -(-max_model_len // size)),
        num_swap_slots=blocks(spec.num_swap_slots),
    )


def _requests(draw: Random, max_model_len: int, calm: bool) -> tuple[RequestSpec, ...]:
    prefixes = [_tokens(draw, draw.randint(1, max_model_len - 2)) for _ in range(draw.randint(1, 3))]
    cancels = draw.choice((0.0, 0.2, 0.9))
    requests = []
    for number in range(draw.randint(3, 14)):
        prefix = draw.choice(prefixes) if draw.random() < 0.7 else ()
        whole = prefix + _tokens(draw, draw.randint(1, max_model_len))
        prompt = whole[: draw.randint(1, max_model_len - 1)]
        left = max_model_len - len(prompt)
        requests.append(
            RequestSpec(
                name=f"r{number}",
                at=draw.uniform(1.0, LOAD_SECONDS) if draw.random() < 0.5 else draw.uniform(1.0, 1.5),
                prompt=prompt,
                max_tokens=draw.randint(1, left),
                timeout=None if calm or draw.random() < 0.7 else draw.uniform(0.01, 6.0),
                cancel_after=draw.uniform(0.0, 0.5) if draw.random() < cancels else None,
            )
        )
    return tuple(sorted(requests, key=lambda request: request.at))


def _tokens(draw: Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(16, 1000) for _ in range(count))


def _faults(draw: Random) -> tuple[Fault, ...]:
    kinds = [FaultKind.CRASH, FaultKind.PAUSE, FaultKind.DRAIN, FaultKind.BREAK, FaultKind.BREAK]
    kinds += [FaultKind.REDIS_AWAY, FaultKind.REDIS_EMPTY]
    faults = []
    for _ in range(draw.choice((0, 1, 2, 4, 8, 16))):
        kind = draw.choice(kinds)
        # A good part early on, when most requests are under way.
        at = draw.uniform(1.0, LOAD_SECONDS) if draw.random() < 0.5 else draw.uniform(1.0, 2.0)
        seconds = draw.choice((0.02, 0.3, 2.0, 6.0, 15.0)) * draw.uniform(0.5, 1.5)
        faults.append(Fault(at, kind, draw.randrange(1 << 16), seconds, draw.random() < 0.2))
    return tuple(sorted(faults, key=lambda fault: fault.at))
