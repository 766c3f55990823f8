"""Draws what a seed decides: sizes, times and chances, and how often each. Pure.

Pools are short, answers long, leases and pauses of a size with steps and messages: what is to be found lies where
several waits are about to end.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from random import Random

from discovery.records import WorkerRole
from sim.engine_driver import StepTimes
from sim.scenario import (
    CLIENTS,
    LOAD_SECONDS,
    OF_REDIS,
    REDIS,
    Delays,
    Fault,
    FaultKind,
    RequestSpec,
    RouterSpec,
    Scenario,
    WorkerSpec,
)


def make_scenario(seed: int) -> Scenario:
    draw = Random(f"scenario {seed}")
    block_size = draw.choice((1, 2, 4, 8))
    max_model_len = block_size * draw.randint(max(2, 16 // block_size), max(4, 48 // block_size))
    kind = draw.choices(("calm", "only Redis", "any"), (1, 1, 8))[0]
    calm = kind != "any"
    lossy = not calm and draw.random() < 0.4
    drifts = draw.random() < 0.3
    workers = _workers(draw, block_size, max_model_len, drifts)
    routers = tuple(
        RouterSpec(f"router-{number}", _rate(draw, drifts)) for number in range(draw.choice((1, 1, 2)))
    )  # fmt: skip
    slow_share = 0.0 if calm else draw.choice((0.0, 0.01, 0.05))
    return Scenario(
        seed=seed,
        max_model_len=max_model_len,
        lease_seconds=draw.choice((0.5, 1.0, 3.0) if not calm else (1.0, 5.0)),
        local_prefill_tokens=draw.choice((0, 0, 4, 16)),
        fetch_prefix_tokens=Random(f"fetches {seed}").choice((0, 1, 4)),
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
        workers=_with_slow_news(seed, _with_other_block_sizes(seed, workers, max_model_len)),
        routers=routers,
        requests=_requests(draw, max_model_len, calm, routers),
        faults=_FAULTS[kind](draw, workers, routers),
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
                    block_size=block_size,
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


def _with_slow_news(seed: int, workers: tuple[WorkerSpec, ...]) -> tuple[WorkerSpec, ...]:
    """Of one system in three: between event loop and engine a word takes as long as a whole pull may, or a step, so
    that much more crosses on the way."""
    draw = Random(f"slow news {seed}")
    if draw.random() >= 1 / 3:
        return workers
    hop = draw.choice((0.02, 0.1, 0.3))
    return tuple(replace(spec, steps=replace(spec.steps, hop=hop)) for spec in workers)


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


def _no_faults(draw: Random, workers: tuple[WorkerSpec, ...], routers: tuple[RouterSpec, ...]) -> tuple[Fault, ...]:
    return ()


def _faults_of_redis(
    draw: Random, workers: tuple[WorkerSpec, ...], routers: tuple[RouterSpec, ...]
) -> tuple[Fault, ...]:
    """Once everybody knows everybody."""
    places = [worker.id for worker in workers] + [router.id for router in routers]
    faults = []
    for _ in range(draw.choice((1, 2, 4, 8))):
        kind = draw.choice((*OF_REDIS, FaultKind.PARTITION))
        target, other = (draw.choice(places), REDIS) if kind is FaultKind.PARTITION else ("", "")
        at, seconds = draw.uniform(2.5, LOAD_SECONDS), draw.choice((0.3, 2.0, 6.0)) * draw.uniform(0.5, 1.5)
        faults.append(Fault(at, kind, seconds, target, other, draw.randrange(1 << 16)))
    return tuple(sorted(faults, key=lambda fault: fault.at))


def _faults(draw: Random, workers: tuple[WorkerSpec, ...], routers: tuple[RouterSpec, ...]) -> tuple[Fault, ...]:
    kinds = [kind for kind, weight in _KINDS.items() for _ in range(weight)]
    at_routers = {router.id for router in routers}
    places = [worker.id for worker in workers for _ in range(3)] + sorted(at_routers)
    faults = []
    for _ in range(draw.choice((0, 1, 2, 4, 8, 16))):
        kind = draw.choice(kinds)
        target = draw.choice(places)
        other = draw.choice([place for place in (*places, CLIENTS, REDIS) if place != target])
        if kind is not FaultKind.PARTITION:
            other = ""
        if kind is FaultKind.BREAK or kind in OF_REDIS:
            target = ""
        # A good part early on, when most requests are under way.
        at = draw.uniform(1.0, LOAD_SECONDS) if draw.random() < 0.4 else draw.uniform(1.0, 2.0)
        seconds = draw.choice((0.02, 0.3, 2.0, 2.0, 6.0, 15.0)) * draw.uniform(0.5, 1.5)
        if target in at_routers and kind is FaultKind.CRASH:
            seconds = min(seconds, 1.0)  # whoever asks meanwhile is told so at once, and that is all
        if kind is FaultKind.CLOCK_JUMP:
            seconds = draw.choice((0.3, 2.0, 5.0)) * draw.uniform(0.5, 1.5)
        faults.append(Fault(at, kind, seconds, target, other, draw.randrange(1 << 16), draw.random() < 0.3))
    return tuple(sorted(faults, key=lambda fault: fault.at))


_FAULTS = {"calm": _no_faults, "only Redis": _faults_of_redis, "any": _faults}
