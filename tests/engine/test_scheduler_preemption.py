"""The scheduler in too small a pool: what is preempted is computed again or swapped, and every stream is exact."""

from __future__ import annotations

import math

import pytest

from engine.messages import (
    Abort,
)
from engine.pacing import Pace, Pacer
from engine.plan import MoveKind
from tests.engine.scheduler_harness import KNOWN, Harness, prompt_of
from tests.engine.scripted_runner import continuation

pytestmark = pytest.mark.usefixtures("steps")


def test_preemption_keeps_every_stream_exact():
    h = Harness(blocks=20, seqs=8, max_len=64)
    requests = [(h.add(f"r{i}", prompt_of(12, seed=i), count=30), prompt_of(12, seed=i)) for i in range(8)]
    h.run()
    assert h.scheduler.counters.preemptions > 0, "the pool was meant to be too small"
    for request, prompt in requests:
        assert h.tokens[request] == continuation(prompt, 30)
    assert h.idle()


def short_of_blocks(monkeypatch: pytest.MonkeyPatch, swap: int, swap_seconds: float) -> Harness:
    """Eight requests in a pool for three, each answered as if alone."""
    pace = Pace(math.inf, 1000, KNOWN, swap_seconds)
    pacer = Pacer()
    monkeypatch.setattr(pacer, "pace", lambda: pace)
    h = Harness(blocks=20, seqs=8, max_len=64, swap=swap, pacer=pacer)
    requests = [(h.add(f"r{i}", prompt_of(12, seed=i), count=30), prompt_of(12, seed=i)) for i in range(8)]
    h.run()
    assert h.scheduler.counters.preemptions > 0, "the pool was meant to be too small"
    for request, prompt in requests:
        assert h.tokens[request] == continuation(prompt, 30)
    assert h.idle()
    return h


def test_what_is_swapped_out_comes_back_without_being_computed_again(monkeypatch: pytest.MonkeyPatch):
    h = short_of_blocks(monkeypatch, swap=200, swap_seconds=1e-6)
    assert h.runner.moves[MoveKind.SWAP_OUT] > 0
    assert 0 < h.runner.moves[MoveKind.SWAP_IN] <= h.runner.moves[MoveKind.SWAP_OUT]
    assert h.runner.computed_tokens == 8 * (12 + 29)


def test_what_is_cheaper_to_compute_again_is_not_swapped(monkeypatch: pytest.MonkeyPatch):
    h = short_of_blocks(monkeypatch, swap=200, swap_seconds=1.0)
    assert not h.runner.moves
    assert h.runner.computed_tokens > 8 * (12 + 29)


def test_what_finds_no_room_in_host_memory_is_computed_again(monkeypatch: pytest.MonkeyPatch):
    h = short_of_blocks(monkeypatch, swap=5, swap_seconds=1e-6)
    assert h.runner.moves[MoveKind.SWAP_OUT] > 0
    assert h.runner.computed_tokens > 8 * (12 + 29)


def test_an_abort_while_swapped_out_frees_the_host_memory(monkeypatch: pytest.MonkeyPatch):
    pace = Pace(math.inf, 1000, KNOWN, 1e-6)
    pacer = Pacer()
    monkeypatch.setattr(pacer, "pace", lambda: pace)
    h = Harness(blocks=12, seqs=8, max_len=48, swap=200, pacer=pacer)
    requests = [h.add(f"r{i}", prompt_of(12, seed=i), count=30) for i in range(3)]
    while not h.scheduler.load().swapped:
        assert h.step()
    for request in requests:
        h.engine.handle(Abort(request))
    h.run()
    assert h.idle()
    assert len(h.ended) == 3
