"""Makes a failing scenario small: takes away what it breaks without, as long as it breaks in the same way.

A scenario is plain data and its delays are its seed's, so each try is a run like any other, and the same seed shrinks
to the same story every time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from sim.planted.plant import Plant
from sim.run import run_scenario
from sim.scenario import CLIENTS, REDIS, RequestSpec, Scenario, WorkerSpec
from sim.world import Outcome

T = TypeVar("T")
_MOST_RUNS = 300
_NAMES = re.compile(r"\b(?:prefill|decode|unified|router)-\d+(?:\.\d+)?|\br\d+|\[.*?\]|[0-9a-f]{8,}|\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Shrunk:
    scenario: Scenario
    outcome: Outcome
    runs: int


def kind_of(outcome: Outcome) -> str:
    """What broke, whoever it was. Empty where nothing did."""
    return _NAMES.sub("·", outcome.broken[0])[:60] if outcome.broken else ""


def shrink(scenario: Scenario, plant: Plant | None = None, most_runs: int = _MOST_RUNS) -> Shrunk:
    """`scenario` breaks."""
    shrinker = _Shrinker(scenario, plant, most_runs)
    while shrinker.again():
        pass
    return Shrunk(shrinker.best, run_scenario(shrinker.best, story=True, plant=plant), shrinker.runs)


class _Shrinker:
    def __init__(self, scenario: Scenario, plant: Plant | None, most_runs: int) -> None:
        self.best = scenario
        self.runs = 0
        self._plant = plant
        self._most_runs = most_runs
        self._kind = kind_of(run_scenario(scenario, plant=plant))

    def again(self) -> bool:
        """One pass over all that may be taken away. False: nothing was, or there were tries enough."""
        before = self.best
        self._thin_out(lambda s: s.faults, lambda s, faults: replace(s, faults=faults))
        self._thin_out(lambda s: s.requests, lambda s, requests: replace(s, requests=requests))
        for simplify in _SIMPLER:
            self._try(simplify(self.best))
        for worker in self.best.workers:
            self._try(_without(self.best, worker))
        for number in range(len(self.best.requests)):
            for simpler in _simpler_requests(self.best.requests[number]):
                requests = list(self.best.requests)
                requests[number] = simpler
                self._try(replace(self.best, requests=tuple(requests)))
        return self.best != before and self.runs < self._most_runs

    def _thin_out(
        self, get: Callable[[Scenario], tuple[T, ...]], put: Callable[[Scenario, tuple[T, ...]], Scenario]
    ) -> None:
        """Takes away half, then quarters, down to one at a time."""
        size = max(1, len(get(self.best)) // 2)
        while True:
            at = 0
            while at < len(items := get(self.best)):
                if not self._try(put(self.best, items[:at] + items[at + size :])):
                    at += size
            if size == 1:
                return
            size //= 2

    def _try(self, scenario: Scenario) -> bool:
        """Whether it still breaks in the same way; then it is the best so far."""
        if scenario == self.best or self.runs >= self._most_runs:
            return False
        self.runs += 1
        if kind_of(run_scenario(scenario, plant=self._plant)) != self._kind:
            return False
        self.best = scenario
        return True


def _one_router(scenario: Scenario) -> Scenario:
    first = scenario.routers[0]
    return _in_place(
        replace(
            scenario,
            routers=(first,),
            requests=tuple(replace(request, router=first.id) for request in scenario.requests),
        )
    )


def _without(scenario: Scenario, worker: WorkerSpec) -> Scenario:
    workers = tuple(other for other in scenario.workers if other.id != worker.id)
    if not any(other.role.value != "prefill" for other in workers):
        return scenario  # nobody would serve
    return _in_place(replace(scenario, workers=workers))


def _in_place(scenario: Scenario) -> Scenario:
    """Without the faults of places that are gone."""
    places = {*scenario.places, CLIENTS, REDIS}
    return replace(scenario, faults=tuple(fault for fault in scenario.faults if fault.places <= places))


def _with_true_clocks(scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        workers=tuple(replace(worker, clock_rate=1.0) for worker in scenario.workers),
        routers=tuple(replace(router, clock_rate=1.0) for router in scenario.routers),
    )


_SIMPLER: tuple[Callable[[Scenario], Scenario], ...] = (
    lambda s: replace(s, delays=replace(s.delays, slow_share=0.0)),
    lambda s: replace(s, delays=replace(s.delays, repeat_share=0.0)),
    lambda s: replace(s, transport_corrupt=0.0),
    lambda s: replace(s, transport_drop=0.0),
    lambda s: replace(s, transport_duplicate=0.0),
    lambda s: replace(s, transport_straggle=0.0),
    _with_true_clocks,
    _one_router,
)


def _simpler_requests(request: RequestSpec) -> Iterator[RequestSpec]:
    yield replace(request, cancel_after=None)
    yield replace(request, timeout=None)
    for share in (4, 2):
        yield replace(request, max_tokens=max(1, request.max_tokens // share))
        yield replace(request, prompt=request.prompt[: max(1, len(request.prompt) // share)])


def what_is_left(shrunk: Shrunk, of: Scenario) -> str:
    """In a sentence, for whoever reads the story."""
    left = shrunk.scenario
    kept = [
        f"{len(left.requests)} of {len(of.requests)} requests",
        f"{len(left.faults)} of {len(of.faults)} faults",
        f"{len(left.workers)} of {len(of.workers)} workers",
    ]
    chances = {
        "slow messages": left.delays.slow_share,
        "repeated messages": left.delays.repeat_share,
        "damaged blocks": left.transport_corrupt,
        "lost blocks": left.transport_drop,
        "repeated blocks": left.transport_duplicate,
        "late writes": left.transport_straggle,
    }
    besides = [name for name, chance in chances.items() if chance]
    if not left.clocks_agree:
        besides.append("clocks that differ")
    return f"{', '.join(kept)}" + (f"; {', '.join(besides)}" if besides else "") + f" ({shrunk.runs} tries)"
