"""`python -m tests.fuzz`: damaged messages at every door of a worker, with a progress line."""

from __future__ import annotations

import argparse
import asyncio
import sys

from tests.fuzz.fuzzer import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(asyncio.run(fuzz(args.seed, args.messages, lambda line: print(line, file=sys.stderr, flush=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
