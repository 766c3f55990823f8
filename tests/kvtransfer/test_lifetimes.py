"""The two tables, as properties."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InternalError
from baton.metrics import Metrics, TransferMetrics
from kvtransfer.counting import count_state
from kvtransfer.lifetimes import DESTINATION, LIVE, SOURCE, DestinationState, Lifetime, SourceState

Table = Mapping[Any, frozenset[Any]]
TABLES: list[tuple[Table, Enum]] = [(SOURCE, SourceState.OFFERED), (DESTINATION, DestinationState.RESERVED)]


@pytest.mark.parametrize(("table", "initial"), TABLES)
def test_every_state_is_reached_and_every_path_can_end(table: Table, initial: Enum) -> None:
    reached, frontier = {initial}, [initial]
    while frontier:
        for following in table[frontier.pop()]:
            if following not in reached:
                reached.add(following)
                frontier.append(following)
    assert reached == set(table) == set(type(initial))
    ending = {state for state in table if not table[state]}
    for _ in table:
        ending |= {state for state in table if table[state] & ending}
    assert ending == set(table)


@pytest.mark.parametrize(("table", "initial"), TABLES)
@given(data=st.data())
def test_a_lifetime_goes_only_where_its_table_says(table: Table, initial: Enum, data: st.DataObject) -> None:
    steps: list[tuple[Any, Any]] = []
    lifetime = Lifetime(table, initial, lambda old, new: steps.append((old, new)))
    terminal_entered = 0
    for wanted in data.draw(st.lists(st.sampled_from(list(table)), max_size=12)):
        before = lifetime.state
        if wanted in table[before]:
            lifetime.to(wanted)
            assert lifetime.state is wanted
            terminal_entered += lifetime.terminal
        else:
            with pytest.raises(InternalError, match=f"from {before.name} to {wanted.name}"):
                lifetime.to(wanted)
            assert lifetime.state is before
    assert terminal_entered <= 1
    assert steps[0] == (None, initial)
    assert all(new in table[old] for old, new in steps[1:])
    assert steps[-1][1] is lifetime.state


def test_reserved_blocks_are_freed_without_quarantine_as_nobody_writes_into_them() -> None:
    assert DestinationState.QUARANTINED not in DESTINATION[DestinationState.RESERVED]


def test_only_verified_blocks_are_committed() -> None:
    assert [s for s in DESTINATION if DestinationState.COMMITTED in DESTINATION[s]] == [DestinationState.VERIFYING]


@given(walks=st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=8))
def test_the_gauges_add_up_to_the_live_sets(walks: list[list[int]]) -> None:
    metrics = Metrics()
    transfer_metrics = TransferMetrics(metrics)
    lifetimes: list[Lifetime[Any]] = []
    for number, walk in enumerate(walks):
        table, initial = TABLES[number % 2]
        lifetime = Lifetime(table, initial, lambda old, new: count_state(transfer_metrics, old, new))
        for choice in walk:
            options = sorted(table[lifetime.state], key=lambda s: str(s.value))
            if options:
                lifetime.to(options[choice % len(options)])
        lifetimes.append(lifetime)
    for _, initial in TABLES:
        for state in type(initial):
            name = "baton_kv_transfers" if state.value in LIVE else "baton_kv_transfers_ended_total"
            value = metrics.registry.get_sample_value(name, {"state": str(state.value)}) or 0
            assert value == sum(lifetime.state is state for lifetime in lifetimes)
