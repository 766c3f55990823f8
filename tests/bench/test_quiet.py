"""What is waited for before a side's turn."""

from __future__ import annotations

import pytest

from bench.quiet import Quiet, Ticks, _ticks


class Machine:
    """Each sample is 100 ticks, of which `busy` names the busy ones; the last one stays."""

    def __init__(self, busy: list[int]) -> None:
        self._busy, self._now, self.samples = busy, (0, 0), 0

    def read(self) -> Ticks:
        return self._now

    def sleep(self, _: float) -> None:
        busy = self._busy[min(self.samples, len(self._busy) - 1)]
        self.samples += 1
        self._now = (self._now[0] + busy, self._now[1] + 100)


def test_a_turn_begins_when_what_spins_has_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine([50, 50, 50, 2])
    Quiet(machine.read, machine.sleep)()
    assert machine.samples == 4
    assert capsys.readouterr().err == ""


def test_a_machine_that_is_never_quiet_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine([40])
    quiet = Quiet(machine.read, machine.sleep)
    quiet()
    assert machine.samples == 50
    assert "keeps 40% of the processors busy" in capsys.readouterr().err
    quiet()
    assert machine.samples == 60, "what was busy all the time is waited for less"
    assert capsys.readouterr().err == ""


def test_where_the_system_does_not_tell_nothing_is_waited_for() -> None:
    machine = Machine([100])
    Quiet(lambda: None, machine.sleep)()
    assert machine.samples == 0


def test_the_systems_own_count_grows() -> None:
    first, second = _ticks(), _ticks()
    assert first is not None
    assert second is not None
    assert second[1] >= first[1] > first[0] > 0
