"""Virtual time: every node by its own clock, and what pausing, dying and jumping do to what it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from sim.loop import Node, Stalled, VirtualLoop


def run(*starts: tuple[Node, Coroutine[Any, Any, Any]], then: Coroutine[Any, Any, None]) -> None:
    loop = VirtualLoop(lambda: 0.001)
    for node, work in starts:
        node.context.run(loop.create_task, work)
    loop.run_until_complete(then)
    loop.close()


async def note_after(seconds: float, told: list[float]) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    await asyncio.sleep(seconds)
    told.append(loop.now)


async def wait(seconds: float) -> None:
    await asyncio.sleep(seconds)


def test_a_fast_clock_wakes_early_and_a_slow_one_late() -> None:
    fast, slow = list[float](), list[float]()
    run((Node("fast", rate=1.1), note_after(1.1, fast)), (Node("slow", rate=0.9), note_after(0.9, slow)), then=wait(2))
    assert fast == [pytest.approx(1.0)]
    assert slow == [pytest.approx(1.0)]


def test_a_clock_that_jumps_wakes_its_own_node_alone() -> None:
    jumps, stays = Node("jumps"), Node("stays")
    told: dict[str, list[float]] = {"jumps": [], "stays": []}

    async def then() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        await asyncio.sleep(1)
        loop.jump(jumps, 3)
        await asyncio.sleep(9)

    run((jumps, note_after(5, told["jumps"])), (stays, note_after(5, told["stays"])), then=then())
    assert told == {"jumps": [pytest.approx(2.0)], "stays": [pytest.approx(5.0)]}


def test_a_clock_never_shows_less_than_was_waited_for() -> None:
    """Else who waits until then would look, find it too early, and wait for no time at all, for ever."""
    node, seen = Node("odd", rate=1.0037), list[bool]()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for number in range(1, 200):
            until = loop.time() + 0.1 / number
            await asyncio.sleep(until - loop.time())
            seen.append(loop.time() >= until)

    run((node, work()), then=wait(10))
    assert seen == [True] * 199


def test_a_node_that_is_paused_goes_on_with_what_it_missed() -> None:
    node, told = Node("stopped"), list[float]()

    async def then() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        node.paused = True
        await asyncio.sleep(3)
        loop.resume(node)
        await asyncio.sleep(1)

    run((node, note_after(1, told)), then=then())
    assert told == [pytest.approx(3.0)]


def test_who_waits_for_what_never_comes_is_found() -> None:
    loop = VirtualLoop(lambda: 0.001)
    with pytest.raises(Stalled):
        loop.run_until_complete(loop.create_future())
    loop.close()
