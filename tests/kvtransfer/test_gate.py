"""The gate: who is inside, and when the last one is out."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.gate import Gate, ReadPermit


@given(st.lists(st.sampled_from(["enter", "leave", "stay", "close"]), max_size=30))
def test_drained_is_said_once_and_only_when_closed_and_empty(steps: list[str]) -> None:
    gate, inside, closed, said = Gate(), 0, False, []
    for step in steps:
        if step == "enter":
            assert gate.enter() is not closed
            inside += not closed
        elif step == "stay" and inside:
            gate.stay()
            inside += 1
        elif step == "leave" and inside:
            gate.leave()
            inside -= 1
        elif step == "close" and not closed:
            closed = True
            if gate.close(lambda: said.append("by the last one out")):
                said.append("at once")
        assert gate.in_flight == inside
        assert len(said) == (closed and inside == 0)


def test_many_threads_and_one_close_drain_once() -> None:
    gate, drained, said = Gate(), threading.Event(), []
    entered = threading.Barrier(9)

    def work() -> None:
        with gate.passing() as admitted:
            assert admitted
            entered.wait(5)
            closed.wait(5)
        with gate.passing() as admitted:
            assert not admitted

    def on_drained() -> None:
        said.append(gate.in_flight)
        drained.set()

    closed = threading.Event()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    entered.wait(5)
    assert not gate.close(on_drained)
    closed.set()
    assert drained.wait(5)
    for thread in threads:
        thread.join(5)
    assert said == [0]


def test_a_permit_covers_a_block_in_one_generation_only() -> None:
    permit = ReadPermit(Gate())
    permit.allow(3, 7)
    assert permit.covers(3, 7)
    assert not permit.covers(3, 8)
    assert not permit.covers(4, 7)
