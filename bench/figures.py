"""What was measured, as plain data, and the Markdown that shows it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One quantity of one side: a value a round."""

    measure: str
    """Names the table that it stands in, such as `decode step`."""
    case: str
    """Names the row, such as `batch 8`."""
    side: str
    unit: str
    runs: tuple[float, ...]
    more_is_better: bool = False
    bound: float | None = None
    """The best that this machine could do by its roofline, in the same unit; None where that says nothing."""

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def share_of_bound(self) -> float | None:
        """1 is as good as the machine can be."""
        if self.bound is None or not self.median or not self.bound:
            return None
        return self.median / self.bound if self.more_is_better else self.bound / self.median

    def as_json(self) -> dict[str, object]:
        return {
            "measure": self.measure,
            "case": self.case,
            "side": self.side,
            "unit": self.unit,
            "more_is_better": self.more_is_better,
            "median": self.median,
            "low": min(self.runs),
            "high": max(self.runs),
            "runs": list(self.runs),
            "bound": self.bound,
            "share_of_bound": self.share_of_bound,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy has it. NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def by_measure(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """In the order in which they were measured."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.measure, []).append(figure)
    return found


def report(figures: Iterable[Figure]) -> str:
    """All tables, one a measure."""
    return "\n\n".join(table(measure, of_one) for measure, of_one in by_measure(figures).items())


def table(measure: str, figures: Sequence[Figure]) -> str:
    """A row a case, a column a side: median (least–most). Behind them what the machine allows and how near the first
    side comes to it, and the first side over each other. Rows of several units say each its own."""
    sides, cases = _unique(f.side for f in figures), _unique(f.case for f in figures)
    found = {(f.case, f.side): f for f in figures}
    mixed = len({(f.unit, f.more_is_better) for f in figures}) > 1
    title = measure if mixed else f"{measure} ({figures[0].unit}, {better(figures[0])} is better)"
    units = {f.case: f.unit for f in figures}
    has_bound = any(f.bound is not None for f in figures)
    head = [title, *sides]
    if has_bound:
        head += ["machine's bound", f"{sides[0]}: share of it"]
    head += [f"{sides[0]} : {other}" for other in sides[1:]]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for case in cases:
        first = found.get((case, sides[0]))
        row = [f"{case}, {units[case]}" if mixed else case, *(_cell(found.get((case, side))) for side in sides)]
        if has_bound:
            bound = next((f.bound for f in figures if f.case == case and f.bound is not None), None)
            share = None if first is None else first.share_of_bound
            row += ["–" if bound is None else number(bound), "–" if share is None else f"{share:.0%}"]
        row += [_ratio(first, found.get((case, other))) for other in sides[1:]]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def better(figure: Figure) -> str:
    return "more" if figure.more_is_better else "less"


def number(value: float) -> str:
    """Three digits, and whole from a hundred on."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _cell(figure: Figure | None) -> str:
    if figure is None or not any(map(math.isfinite, figure.runs)):
        return "–"
    if len(figure.runs) == 1:
        return number(figure.median)
    return f"{number(figure.median)} ({number(min(figure.runs))}–{number(max(figure.runs))})"


def _ratio(first: Figure | None, other: Figure | None) -> str:
    return "–" if first is None or other is None or not other.median else f"{first.median / other.median:.2f}"


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
