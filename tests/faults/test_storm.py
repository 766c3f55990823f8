"""Invariants 4 to 8 on real processes: workers, router and Redis are killed, stopped, restarted and cut off at random
moments under load. Every answer is transformers' token for token, every request has its one terminal reply in time, and
nothing is held afterwards.

    make soak ARGS="-k storm --storm-minutes=60"        as long as one likes; python -m tests.faults runs one storm
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.faults.load import Ending
from tests.faults.oracle import Known, known_answers
from tests.faults.schedule import Kind
from tests.faults.storm import storm
from tests.faults.system import Shape

SHAPES = [
    Shape(prefill=2, decode=2, transport="shm"),
    Shape(prefill=2, decode=2, transport="tcp"),
    Shape(unified=2),
]
ENDS = (Kind.KILL, Kind.RESTART)
SHORT_SECONDS = 8.0
REQUESTS = 1000


@cache
def known(each: int) -> list[Known]:
    return known_answers(each, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("shape", "without"),
    [(SHAPES[0], ()), (SHAPES[1], ENDS), (SHAPES[2], ())],
    ids=[str(SHAPES[0]), f"{SHAPES[1]}, nobody dies", str(SHAPES[2])],
)
async def test_answers_stay_right_and_nothing_leaks_under_faults(
    shape: Shape, without: Sequence[Kind], tmp_path: Path
) -> None:
    """Where no worker is killed, none forgets what it leaked."""
    summary = await storm(
        shape,
        7,
        known(3),
        tmp_path,
        enough=lambda _, seconds: seconds >= SHORT_SECONDS,
        mean_gap=1.0,
        without=without,
        say=print,
    )
    print(summary)
    assert summary.good, summary.explain(tmp_path)
    assert summary.endings[Ending.ANSWERED] >= 10, summary.explain(tmp_path)
    assert summary.faults.total() >= 5, "a storm of no faults shows nothing"
    assert summary.transferred > 0 or shape.unified, "no blocks were handed over"


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("without", [(), ENDS], ids=["", "nobody dies"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
async def test_a_long_storm(shape: Shape, without: Sequence[Kind], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The bar: 1,000 requests, a fault every 2 s on average; wrong tokens, hung requests, leaked blocks: 0, 0, 0."""
    minutes, seed = pytestconfig.getoption("storm_minutes"), pytestconfig.getoption("storm_seed")

    def say(line: str) -> None:
        print(line, file=sys.__stderr__, flush=True)

    summary = await storm(
        shape,
        seed,
        known(12),
        tmp_path,
        enough=lambda asked, seconds: asked >= REQUESTS and seconds >= minutes * 60,
        without=without,
        say=say,
    )
    say(str(summary))
    assert summary.good, summary.explain(tmp_path)
    assert summary.endings[Ending.ANSWERED] >= summary.asked / 2, summary.explain(tmp_path)
