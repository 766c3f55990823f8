"""The storms' own judgement: what is wrong is called wrong, what is held is seen, and a seed draws the same faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from typing import Any, cast

import pytest

from baton import errors
from baton.metrics import EngineMetrics, Metrics, TransferMetrics
from baton.v1 import inference_pb2 as pb
from tests.faults.load import PATIENCE, Ask, Ending, Load
from tests.faults.oracle import Known
from tests.faults.schedule import Kind, faults
from tests.faults.system import held

KNOWN = Known(prompt=(7, 8), greedy=(10, 11, 12, 1, 13), end=4)
END = pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))
PARTS = ["redis", "router", "prefill-0", "decode-0"]
LINKS = [("router", "prefill-0"), ("decode-0", "prefill-0"), ("decode-0", "redis")]


def tokens(*ids: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(token_ids=ids)


class Says:
    """In the place of a client."""

    def __init__(self, *parts: pb.GenerateResponse | Exception) -> None:
        self._parts = parts

    async def generate(self, *_: object, **__: object) -> AsyncIterator[pb.GenerateResponse]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part
        if not self._parts:
            await asyncio.Event().wait()


def ask(**changes: Any) -> Ask:
    fields: dict[str, Any] = {"max_tokens": 8, "ignore_eos": False, "salt": b"", "deadline": PATIENCE, "leaves": None}
    return Ask(0, KNOWN, **(fields | changes))


@pytest.mark.parametrize(
    ("parts", "ending"),
    [
        ([tokens(10, 11), tokens(12, 1), END], Ending.ANSWERED),
        ([tokens(10, 11), tokens(12), END], Ending.WRONG),
        ([tokens(10, 12)], Ending.WRONG),
        ([tokens(10), tokens(10), tokens(11, 12, 1), END], Ending.WRONG),
        ([tokens(10, 11, 12, 1, 13), END], Ending.WRONG),
        ([tokens(10, 11, 12, 1)], Ending.WRONG),
        ([tokens(10, 11, 12, 1), END, tokens()], Ending.WRONG),
        ([tokens(99), errors.Unavailable("nobody is there")], Ending.WRONG),
        ([tokens(10), errors.InternalError("a defect")], Ending.WRONG),
        ([tokens(10), errors.RequestCancelled("by whom?")], Ending.WRONG),
        ([tokens(10), errors.Unavailable("no decode worker is ready")], Ending.FAILED),
        ([tokens(10), errors.Unavailable("the router at 1.2.3.4:5 went away")], Ending.LOST),
        ([tokens(10), errors.DeadlineExceeded("too late")], Ending.HUNG),
    ],
)
async def test_what_becomes_of_a_request(parts: Sequence[Any], ending: Ending) -> None:
    assert await judged(Says(*parts), ask()) is ending


async def test_a_short_deadline_may_pass_and_an_asker_may_leave() -> None:
    assert await judged(Says(errors.DeadlineExceeded("too late")), ask(deadline=0.1)) is Ending.DEADLINE
    assert await judged(Says(), ask(leaves=0.01)) is Ending.CANCELLED
    assert await judged(Says(tokens(10, 11), END), ask(max_tokens=2)) is Ending.ANSWERED
    assert await judged(Says(tokens(10, 11, 12, 1, 13), END), ask(max_tokens=5, ignore_eos=True)) is Ending.ANSWERED


async def judged(client: Says, asked: Ask) -> Ending:
    ending, _ = await Load(cast(Any, None), [KNOWN], 1).judge(cast(Any, client), asked)
    return ending


def test_what_a_worker_holds_is_seen_on_its_page() -> None:
    metrics = Metrics()
    engine, transfers = EngineMetrics(metrics, "m"), TransferMetrics(metrics)
    engine.kv_blocks["free"].set(60)
    engine.kv_blocks["cached"].set(4)
    page = metrics.render().decode()
    assert held("w", page, 64) == []
    assert held("w", page, 65) != [], "a block is lost"
    for state in ("active", "offered", "landing", "quarantined"):
        engine.kv_blocks[state].set(1)
        assert f"w: 1 blocks {state}" in held("w", metrics.render().decode(), 65)
        engine.kv_blocks[state].set(0)
    transfers.transfers.labels(state="claimed").inc()
    engine.num_requests_waiting.set(2)
    assert held("w", metrics.render().decode(), 64) == [
        "w: 1 transfers claimed",
        "w: vllm:num_requests_waiting is 2",
    ]


def test_a_seed_draws_the_same_faults_and_all_kinds_come() -> None:
    drawn = list(islice(faults(1, PARTS, LINKS, 2.0), 1000))
    assert drawn == list(islice(faults(1, PARTS, LINKS, 2.0), 1000))
    assert drawn != list(islice(faults(2, PARTS, LINKS, 2.0), 1000))
    assert {fault.kind for fault in drawn} == set(Kind)
    assert 1.8 < drawn[-1].at / len(drawn) < 2.2
    peaceful = list(islice(faults(1, PARTS, LINKS, 2.0, [Kind.KILL, Kind.RESTART]), 1000))
    assert {fault.kind for fault in peaceful} == set(Kind) - {Kind.KILL, Kind.RESTART}
