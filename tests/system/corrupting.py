"""`baton up` whose decode workers damage one landed block of a request on demand, past all verification: for the KV
probe, which is to see that answers show it. The product has no such switch; this is the tests' own launcher:

    python -m tests.system.corrupting up …          as `baton up …`, with the decode workers below
    python -m tests.system.corrupting decode …      as `baton decode …`, with `Corruptor` where nobody guards any more

What is to be damaged is told by the request's id, so that one system answers damaged and sound requests.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from baton.cli import main as cli
from baton.cli import up
from baton.cli.supervisor import Part
from baton.config import DecodeConfig, parse
from baton.ids import AttemptId, BlockRef
from kvtransfer import PoolMemory

STALE, NOISE = "stale", "noise"
_REQUEST_ID = re.compile(rf"({STALE}|{NOISE})-(\d+)-.*")


@dataclass(frozen=True)
class Damage:
    kind: str
    """STALE: the block keeps what another request had at its place, as if it had not been written. NOISE: its numbers
    are shuffled, so that they keep their scale and lose their meaning."""
    block: int
    """Its place in the prompt."""

    def request_id(self, name: str) -> str:
        return f"{self.kind}-{self.block}-{name}"

    @classmethod
    def asked_for(cls, request_id: str) -> Damage | None:
        match = _REQUEST_ID.fullmatch(request_id)
        return cls(match[1], int(match[2])) if match else None


class Corruptor:
    """A puller's `on_verified`."""

    def __init__(self, memory: PoolMemory) -> None:
        self._memory = memory
        self._before: list[bytes] = []
        """The blocks of the request that landed last, undamaged."""

    def __call__(self, id: AttemptId, blocks: Sequence[BlockRef], first_missing: int) -> None:
        landed = [bytes(self._memory.read(block.index)) for block in blocks]
        damage = Damage.asked_for(id.request_id)
        if damage is not None:
            assert first_missing <= damage.block < len(blocks), f"block {damage.block} of {id} did not land here"
            self._memory.write(blocks[damage.block].index, memoryview(self._damaged(landed[damage.block], damage)))
        self._before = landed

    def _damaged(self, data: bytes, damage: Damage) -> bytes:
        if damage.kind == STALE:
            return self._before[damage.block % len(self._before)]
        numbers = [data[i : i + 4] for i in range(0, len(data), 4)]  # one of float32, or two of 16 bits
        random.Random(damage.block).shuffle(numbers)
        return b"".join(numbers)


def decode(argv: Sequence[str]) -> int:
    from decode_worker.server import make_admission
    from discovery import WorkerRole
    from worker import server

    def make_role(core: Any, send: Any, around: server.Surroundings) -> Any:
        return make_admission(core, send, around, on_verified=Corruptor(around.built.memory))

    return server.main(WorkerRole.DECODE, parse(DecodeConfig, argv, prog="baton decode"), make_role)


def _with_corrupting_decode_workers(worker_parts: Any, *arguments: Any, **options: Any) -> list[Part]:
    parts: list[Part] = worker_parts(*arguments, **options)
    for part in parts:
        python, flag, module, *rest = part.argv
        if module == "decode_worker":
            part.argv = [python, flag, "tests.system.corrupting", "decode", *rest]
    return parts


def main() -> int:
    if sys.argv[1] == "decode":
        return decode(sys.argv[2:])
    up.worker_parts = partial(_with_corrupting_decode_workers, up.worker_parts)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
