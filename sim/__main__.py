"""`baton sim`: runs seeds, and tells of the first one that breaks an invariant."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from baton.errors import BatonError
from sim.planted import PLANTS, find
from sim.run import run_seed
from sim.world import Outcome

_PROGRESS_AFTER_SECONDS = 2.0


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
    started = told = time.monotonic()
    broken: list[Outcome] = []
    events = answered = requests = 0
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        outcome = run_seed(seed, story=arguments.story, plant=plant)
        events += outcome.events
        answered += outcome.answered
        requests += outcome.requests
        if arguments.story:
            print(f"seed {seed}:", *outcome.lines, sep="\n  ")
        if outcome.broken:
            broken.append(outcome)
            print(f"seed {seed} breaks an invariant: {outcome.broken[0]}", flush=True)
            if len(broken) >= arguments.most_broken:
                break
        now = time.monotonic()
        if now - started > _PROGRESS_AFTER_SECONDS and now - told > 1.0 and sys.stderr.isatty():
            told = now
            done = seed + 1 - arguments.first_seed
            print(f"\r{done}/{arguments.seeds} seeds, {done / (now - started):.0f} a second", end="", file=sys.stderr)
    done = seed + 1 - arguments.first_seed
    seconds = time.monotonic() - started
    print(
        f"{done} seeds, {events} events, {answered} of {requests} requests answered, {len(broken)} seeds with a broken "
        f"invariant; {seconds:.1f} s, {done / seconds:.0f} seeds a second"
    )
    if broken and not arguments.story:
        with_plant = f" --planted {plant.name}" if plant is not None else ""
        print(f"replay: baton sim --seeds 1 --first-seed {broken[0].seed}{with_plant} --story")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton sim", description="Drives the real state machines through faults.")
    parser.add_argument("--seeds", type=_positive, default=100, metavar="N", help="how many seeds to run (100)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them (0)")
    parser.add_argument("--planted", metavar="BUG", help="plant a bug that others had, to see it found")
    parser.add_argument("--list-planted", action="store_true", help="list the bugs that can be planted")
    parser.add_argument("--story", action="store_true", help="tell what happened in each seed")
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
