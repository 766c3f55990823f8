"""`baton sim`: runs seeds, and tells of the first one that breaks an invariant."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from baton.errors import BatonError
from sim.planted import PLANTS, find
from sim.planted.plant import Plant
from sim.run import run_seed
from sim.seed import make_scenario
from sim.seeds import most_jobs, outcomes
from sim.shrink import shrink, what_is_left
from sim.world import Outcome

_PROGRESS_AFTER_SECONDS = 2.0
INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.list_planted:
        for known in PLANTS.values():
            print(f"{known.name:<23} {known.what} ({known.upstream})")
        return 0
    try:
        plant = find(arguments.planted) if arguments.planted else None
    except BatonError as error:
        print(f"baton sim: {error.message}", file=sys.stderr)
        return 2
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.story:
        return _tell_stories(seeds, plant)
    tally = _Tally(len(seeds))
    try:
        with outcomes(seeds, arguments.jobs, plant) as found:
            for outcome in found:
                tally.add(outcome)
                if len(tally.broken) >= arguments.most_broken:
                    break
    except KeyboardInterrupt:
        tally.end("interrupted: ")
        return INTERRUPTED
    tally.end()
    if tally.broken:
        with_plant = f" --planted {plant.name}" if plant is not None else ""
        print(f"shrink and tell: baton sim --seeds 1 --first-seed {tally.broken[0].seed}{with_plant} --story")
    return 1 if tally.broken else 0


class _Tally:
    """What came of the seeds so far, and now and then a word about it."""

    def __init__(self, total: int) -> None:
        self.broken: list[Outcome] = []
        self._total = total
        self._started = self._told = time.monotonic()
        self._seeds = self._events = self._answered = self._requests = 0
        # A terminal has one line for it; a log gets a line now and then.
        self._terminal = sys.stderr.isatty()
        self._every = 1.0 if self._terminal else 30.0

    def add(self, outcome: Outcome) -> None:
        self._seeds += 1
        self._events += outcome.events
        self._answered += outcome.answered
        self._requests += outcome.requests
        if outcome.broken:
            self.broken.append(outcome)
            print(f"seed {outcome.seed} breaks an invariant: {outcome.broken[0]}", flush=True)
        now = time.monotonic()
        if now - self._started > _PROGRESS_AFTER_SECONDS and now - self._told > self._every:
            self._told = now
            speed = self._seeds / (now - self._started)
            left = (self._total - self._seeds) / speed
            line = f"{self._seeds}/{self._total} seeds, {speed:.0f} a second, {left:.0f} s left"
            print(f"\r{line}  " if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    def end(self, how: str = "") -> None:
        if self._terminal and self._told > self._started:
            print(file=sys.stderr)
        seconds = time.monotonic() - self._started
        print(
            f"{how}{self._seeds} seeds, {self._events} events, {self._answered} of {self._requests} requests answered, "
            f"{len(self.broken)} seeds with a broken invariant; {seconds:.1f} s, "
            f"{self._seeds / max(seconds, 1e-9):.0f} seeds a second"
        )


def _tell_stories(seeds: range, plant: Plant | None) -> int:
    """Of a seed that breaks, the shortest that breaks in the same way."""
    worst = 0
    for seed in seeds:
        outcome = run_seed(seed, story=True, plant=plant)
        if not outcome.broken:
            print(f"seed {seed}:", *outcome.lines, sep="\n  ")
            continue
        worst = 1
        print(f"seed {seed} breaks an invariant: {outcome.broken[0]}", flush=True)
        scenario = make_scenario(seed)
        shrunk = shrink(scenario, plant)
        print(f"what it takes: {what_is_left(shrunk, scenario)}:", *shrunk.outcome.lines, sep="\n  ")
    return worst


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton sim", description="Drives the real state machines through faults.")
    parser.add_argument("--seeds", type=_positive, default=100, metavar="N", help="how many seeds to run (100)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them (0)")
    parser.add_argument(
        "--jobs", type=_positive, default=most_jobs(), metavar="N", help="processes that run them (as many as cores)"
    )
    parser.add_argument("--planted", metavar="BUG", help="plant a bug that others had, to see it found")
    parser.add_argument("--list-planted", action="store_true", help="list the bugs that can be planted")
    parser.add_argument(
        "--story", action="store_true", help="tell what happened in each seed; one that breaks is made small first"
    )
    parser.add_argument(
        "--most-broken", type=_positive, default=1, metavar="N", help="stop after so many that break (1)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
