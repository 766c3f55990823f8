"""`python -m tests.faults`: a storm of real faults on a real system, with a progress line and a line that sums it up.

Exits 1 where a token was wrong, a request hung, or something leaked, and says then all that is known of it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.faults.oracle import known_answers
from tests.faults.schedule import Kind
from tests.faults.storm import storm
from tests.faults.system import Shape


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="how many are asked at least")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long it goes on at least")
    parser.add_argument("--mean-gap", type=float, default=1.6, help="seconds between two faults; some can not be")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--unified", type=int, default=0, help="these alone, where more than 0")
    parser.add_argument("--transport", choices=("shm", "tcp"), default="shm")
    parser.add_argument("--kv-blocks", type=int, default=256, help="of each worker: so few that requests wait for some")
    parser.add_argument(
        "--without", nargs="*", choices=[kind.value for kind in Kind], default=[], help="faults left out"
    )
    parser.add_argument("--questions", type=int, default=12, help="of each distance")
    args = parser.parse_args()
    apart = (0, 0) if args.unified else (args.prefill, args.decode)
    shape = Shape(*apart, args.unified, args.transport, kv_blocks=args.kv_blocks)
    print(f"{shape}: asking transformers", file=sys.stderr, flush=True)
    known = known_answers(args.questions, args.seed)
    directory = Path(tempfile.mkdtemp(prefix="baton-faults-"))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def enough(requests: int, seconds: float) -> bool:
        return requests >= args.requests and seconds >= args.minutes * 60

    summary = asyncio.run(
        storm(
            shape,
            args.seed,
            known,
            directory,
            enough=enough,
            mean_gap=args.mean_gap,
            without=[Kind(value) for value in args.without],
            say=say,
        )
    )
    if not summary.good:
        say(summary.explain(directory))
    print(summary)
    return 0 if summary.good else 1


if __name__ == "__main__":
    sys.exit(main())
