"""`baton prefill`."""

from __future__ import annotations

import sys

from baton.config import WorkerConfig, parse
from baton.errors import BatonError


def main() -> int:
    try:
        config = parse(WorkerConfig, sys.argv[1:], prog="baton prefill")
    except BatonError as error:
        print(f"baton prefill: {error.message}", file=sys.stderr)
        return 1
    from prefill_worker.server import serve  # imports torch: seconds that a wrong flag need not cost

    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
