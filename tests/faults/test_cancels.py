"""Invariant 7 on real processes: when nearly everybody leaves, nothing of theirs is held for long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.load import Ending, Load, Mix
from tests.faults.oracle import known_answers
from tests.faults.system import Shape, faulty_system, tails

LEAVING = 0.97
"""Share of those that mean to leave; a few are answered first, so that nine of ten are cancelled."""
AT_ONCE = 48
STAY = 2.5
"""Seconds; less than a request takes in this crowd: they leave the queue, the prefill, the handoff and the decode."""
BAR = 2.0
BUSY_MACHINE = 3.0
"""Far below the lease: what was forgotten would be found by it alone."""


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_pools_are_idle_soon_after_nine_of_ten_requests_are_cancelled(tmp_path: Path) -> None:
    await cancel_nine_of_ten("tcp", 100, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_pools_are_idle_soon_after_nine_of_ten_of_500_requests_are_cancelled(
    transport: str, tmp_path: Path
) -> None:
    await cancel_nine_of_ten(transport, 500, tmp_path)


async def cancel_nine_of_ten(transport: str, requests: int, directory: Path) -> None:
    shape = Shape(prefill=2, decode=2, transport=transport, lease_seconds=20.0, kv_blocks=512)
    known = known_answers(3, 1)
    async with faulty_system(shape, directory, seed=1) as system:
        load = Load(system, known, 1, at_once=AT_ONCE, mix=Mix(leaving=LEAVING, stay=STAY, hurried=0.0))
        await load.run(lambda: load.asked >= requests)
        ended = time.monotonic()
        while held := await system.held():
            assert time.monotonic() - ended < BAR + BUSY_MACHINE, f"still held: {held}\n{tails(directory)}"
        idle = time.monotonic() - ended
    print(
        f"{load.asked} requests over {transport}, {load.endings[Ending.CANCELLED]} cancelled: "
        f"idle {idle:.2f} s after the last (bar {BAR:g} s)"
    )
    assert load.endings[Ending.CANCELLED] >= 0.6 * requests, load.endings
    assert load.endings[Ending.CANCELLED] + load.endings[Ending.ANSWERED] == load.asked, load.problems
