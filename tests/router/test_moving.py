"""Streams move away from a worker that drains, token-exact, or end there where nobody could go on with them."""

from __future__ import annotations

import asyncio

import pytest

from baton.v1 import worker_pb2
from tests.router.fake_worker import FakeWorker, Hook, expected_tokens
from tests.router.hooks import HELLO, busy, known_busy, wait_for
from tests.router.system import System, prefill, running, unified


async def test_a_draining_worker_ends_what_it_has_where_nobody_could_go_on_with_it() -> None:
    go_on = asyncio.Event()
    async with running(unified("U1", before_token=wait_for(go_on, index=2))) as system:
        first = asyncio.create_task(system.generate("hello"))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        await drain(system, "U1")
        go_on.set()
        answered = await first
        assert answered.finished.decode_worker == "U1"
        assert answered.token_ids == expected_tokens(HELLO, 8)
        assert not system["U1"].moves


async def drain(system: System, name: str) -> None:
    system[name].draining = True
    system[name].say()
    await system.until(lambda: name not in {key.id for key in system.workers.ready()})


@pytest.mark.parametrize("others", [["U2"], ["U2", "P"]])
async def test_a_stream_moves_away_from_a_worker_that_drains(others: list[str]) -> None:
    more = [prefill(name) if name == "P" else unified(name, load=busy()) for name in others]
    async with running(unified("U1", before_token=stand_still(index=2)), *more) as system:
        await known_busy(system, "U2")
        first = asyncio.create_task(system.generate("hello", max_tokens=20))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        await drain(system, "U1")
        answered = await first
        assert answered.finished.decode_worker == "U2"
        assert answered.token_ids == expected_tokens(HELLO, 20)
        assert answered.finished.timings.resumes == 0, "nothing was lost"
        assert system.value("baton_requests_moved_total") == 1
        (taken,) = system["U2"].submits
        assert taken.id.attempt == 2
        assert taken.num_prompt_tokens == 5
        assert taken.prefix.ticket.worker_id == "U1"
        assert not system["U1"].cancels, "what it offers is to be fetched"
        assert len(system["U1"].moves) == 1


async def test_a_stream_moves_as_soon_as_there_is_somebody_to_move_to() -> None:
    go_on = asyncio.Event()

    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        await (go_on.wait() if at == 2 else asyncio.sleep(0.01))

    async with running(unified("U1", before_token=hook)) as system:
        first = asyncio.create_task(system.generate("hello", max_tokens=200))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        await drain(system, "U1")
        assert not system["U1"].moves
        await system.add(unified("U2"))
        await system.until(lambda: bool(system.workers.ready()))
        go_on.set()
        answered = await first
        assert answered.finished.decode_worker == "U2"
        assert answered.token_ids == expected_tokens(HELLO, 200)


def stand_still(index: int) -> Hook:
    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at >= index:
            await asyncio.Event().wait()

    return hook


async def test_a_worker_that_dies_while_it_is_asked_to_let_a_stream_go_costs_a_resume() -> None:
    async with running(unified("U1", before_token=stand_still(index=2)), unified("U2", load=busy())) as system:
        await known_busy(system, "U2")
        first = asyncio.create_task(system.generate("hello", max_tokens=20))
        await system["U1"].until(lambda: bool(system["U1"].submits))
        system["U1"].deaf = True
        await drain(system, "U1")
        await system["U1"].kill()
        answered = await first
        assert answered.token_ids == expected_tokens(HELLO, 20)
        assert answered.finished.timings.resumes == 1
        assert not system["U2"].submits[0].HasField("prefix")
