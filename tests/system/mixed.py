"""`baton up` whose prefill and decode workers have flags of their own, behind those that both have. The product starts
all workers alike on one machine; unlike ones are started one by one, which would be a harness of its own:

    python -m tests.system.mixed up --on-prefill=--block-size=8 --on-decode=--dtype=bfloat16 …
"""

from __future__ import annotations

import sys

from baton.cli import main as cli
from baton.cli import up
from baton.cli.supervisor import Part
from baton.config import UpConfig

_PREFIXES = {"prefill_worker": "--on-prefill=", "decode_worker": "--on-decode="}


def main() -> int:
    own = [flag for flag in sys.argv if flag.startswith(tuple(_PREFIXES.values()))]
    sys.argv = [argument for argument in sys.argv if argument not in own]
    parts_of = up.worker_parts

    def worker_parts(config: UpConfig, counts: up.Counts, *, embedded: bool) -> list[Part]:
        parts = parts_of(config, counts, embedded=embedded)
        for part in parts:
            prefix = _PREFIXES[part.argv[2]]  # python -m MODULE …
            part.argv = [*part.argv, *(flag.removeprefix(prefix) for flag in own if flag.startswith(prefix))]
        return parts

    up.worker_parts = worker_parts
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
