"""Medians, percentiles and the tables that show them."""

from __future__ import annotations

import math

import pytest

from bench.figures import Figure, number, percentile, report, table


def figure(side: str, *runs: float, case: str = "batch 8", bound: float | None = None, more: bool = False) -> Figure:
    return Figure("decode step", case, side, "ms", runs, more, bound)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([5.0], 99, 5.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 3.0, 2.0], 100, 4.0), (list(range(101)), 99, 99.0)],
)
def test_percentiles_lie_between_the_nearest_ranks(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_of_nothing_there_is_no_percentile() -> None:
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(("more", "bound", "share"), [(False, 10.0, 0.5), (True, 40.0, 0.5), (True, 10.0, 2.0)])
def test_one_is_as_good_as_the_machine_can_be(more: bool, bound: float, share: float) -> None:
    assert figure("baton", 20.0, bound=bound, more=more).share_of_bound == share


def test_a_table_compares_the_first_side_with_the_others_and_with_the_machine() -> None:
    figures = [
        figure("baton", 20, 22, 21, bound=14.0),
        figure("vllm", 28, 28, 28, bound=14.0),
        figure("baton", 5, case="batch 1", bound=4.0),
    ]
    assert table("decode step", figures).splitlines() == [
        "| decode step (ms, less is better) | baton | vllm | machine's bound | baton: share of it | baton : vllm |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| batch 8 | 21.0 (20.0–22.0) | 28.0 (28.0–28.0) | 14.0 | 67% | 0.75 |",
        "| batch 1 | 5.00 | – | 4.00 | 80% | – |",
    ]


def test_rows_of_several_units_say_each_its_own() -> None:
    figures = [
        Figure("x", "TTFT p50", "baton", "ms", (1.0,)),
        Figure("x", "output", "baton", "tok/s", (150.4,), more_is_better=True),
    ]
    assert table("saturated", figures).splitlines()[0] == "| saturated | baton |"
    assert "| output, tok/s | 150 |" in table("saturated", figures)


def test_what_never_came_is_one_dash() -> None:
    figure = Figure("TTFT", "p50", "ours", "ms", (math.nan, math.nan))
    assert table("TTFT", [figure]).splitlines()[-1] == "| p50 | – |"


def test_a_report_has_a_table_for_each_measure_in_their_order() -> None:
    other = Figure("prefill", "128 tokens", "baton", "tok/s", (1.0,))
    heads = [part.split(" (")[0] for part in report([other, figure("baton", 1.0), other]).split("\n\n")]
    assert heads == ["| prefill", "| decode step"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (9.876, "9.88"), (98.76, "98.8"), (9876.0, "9,876"), (math.nan, "–")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
