"""No message, however damaged, breaks a worker: doors.py says what is asked. And the fuzzer finds what it is to find.

make soak ARGS="-k fuzz"        a million messages; python -m tests.fuzz sends as many as asked
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvtransfer import pull, service, ticket
from kvtransfer.gate import ReadPermit
from kvtransfer.refusal import Refusals
from kvtransfer.source import SourceLedger
from kvtransfer.transports import frames
from kvtransfer.transports.base import Want
from tests.fuzz.doors import Broken
from tests.fuzz.fuzzer import Report, fuzz
from tests.kvtransfer.rig import NUM_BLOCKS
from worker.core import WorkerCore

FEW, MANY = 3_000, 1_000_000


def check(report: Report) -> None:
    """A failed landing has a line of its own, for it ends a request of the router's. All else is said rarely."""
    assert report.lines <= report.knocks["landings"] + 100 + report.seconds, str(report)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_worker_outlives_damaged_messages_and_nothing_is_held(seed: int) -> None:
    report = await fuzz(seed, FEW, print)
    check(report)
    assert min(report.knocks.values()) > 20
    assert len(report.knocks) == 9


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_a_worker_outlives_a_million_damaged_messages() -> None:
    def say(line: str) -> None:
        print(line, file=sys.__stderr__, flush=True)

    report = await fuzz(3, MANY, say)
    say(str(report))
    check(report)


def _nothing(*_: Any) -> None:
    pass


_PLANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "claims of another incarnation are granted": (SourceLedger, "_check_incarnation", _nothing),
    "claims are not checked": (service, "check_name", _nothing),
    "tickets' secrets and hashes have any length": (ticket, "check_length", _nothing),
    "unsealed blocks are given out": (ReadPermit, "covers", lambda _, index, __: index < NUM_BLOCKS),
    "what landed is not verified": (pull, "Want", lambda source, generation, place, _: Want(source, generation, place)),
    "refusals are not counted": (Refusals, "note", _nothing),
    "a request for any number of blocks is taken": (frames, "MAX_FETCH_BLOCKS", 2**32),  # type: ignore[dict-item]
    "strange attempts are looked up as if they were there": (
        WorkerCore, "_cancel", lambda core, cancel: core._attempts[cancel.id.request_id, cancel.id.attempt],
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", _PLANTS)
async def test_the_fuzzer_finds_a_check_that_is_missing(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*_PLANTS[plant])
    with pytest.raises(Broken):
        await fuzz(1, 2 * FEW, print)
