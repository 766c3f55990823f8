"""Lines that strangers cause."""

from __future__ import annotations

import logging

import pytest

from baton.clock import ManualClock
from baton.logs import Rarely

log = logging.getLogger("tests.rarely")


def test_of_many_lines_of_a_kind_one_a_minute_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = ManualClock()
    rarely = Rarely(log, clock)
    for _ in range(1000):
        rarely.info("refused", "go away")
        rarely.info("dropped", "too late")
    clock.advance(60)
    rarely.info("refused", "go away")
    assert caplog.messages == [
        "refused: 'go away'",
        "dropped: 'too late'",
        "refused: 'go away' (and 999 more since the last such line)",
    ]


def test_a_stranger_can_not_make_up_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Rarely(log).info("refused", "x\n00:00:00 router E all is lost" + "!" * 10_000)
    (message,) = caplog.messages
    assert "\n" not in message
    assert len(message) < 600
