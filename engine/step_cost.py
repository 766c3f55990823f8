"""Learns what a step costs on this machine, from the steps that it takes. Pure: no torch, no clock.

    seconds ≈ fixed + token · chunk tokens + decode · decodes
                    + decode_attended · positions that decodes see + chunk_attended · positions that chunk tokens see

Least squares with no negative coefficient, of relative errors, so that a decode of 20 ms counts like a step of 200. A
measurement counts for less the more have come since from steps with chunks of about its size: a long spell of mere
decodes does not make it forget what chunks cost. One hiccup moves little, for no measurement counts as further from
what its kind has shown so far than a bound; what lasts is learned all the same, a bound at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.plan import ScheduledSequence


@dataclass(frozen=True, slots=True)
class StepShape:
    """All of a step that its cost depends on. A chunk of a single token is a decode here: it costs the same."""

    chunk_tokens: int = 0
    chunk_attended: int = 0
    """Positions that the chunks' tokens see, themselves included, added up over the tokens."""
    decodes: int = 0
    decode_attended: int = 0

    @classmethod
    def of(cls, scheduled: Iterable[ScheduledSequence]) -> StepShape:
        decodes = decode_attended = chunk_tokens = chunk_attended = 0
        for sequence in scheduled:
            if sequence.count == 1:
                decodes += 1
                decode_attended += sequence.start + 1
            else:
                chunk_tokens += sequence.count
                chunk_attended += sequence.count * sequence.start + sequence.count * (sequence.count + 1) // 2
        return cls(chunk_tokens, chunk_attended, decodes, decode_attended)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """In seconds, none negative."""

    fixed: float = 0.0
    token: float = 0.0
    decode: float = 0.0
    decode_attended: float = 0.0
    chunk_attended: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        return (
            self.fixed
            + self.token * shape.chunk_tokens
            + self.decode * shape.decodes
            + self.decode_attended * shape.decode_attended
            + self.chunk_attended * shape.chunk_attended
        )

    def prefill_seconds(self, num_tokens: int) -> float:
        """What it takes to compute so many tokens from the first on, beside other work."""
        return self.token * num_tokens + self.chunk_attended * num_tokens * (num_tokens + 1) / 2

    def tokens_within(self, seconds: float, start: int, most: int) -> int:
        """The longest chunk from position `start` that costs no more than `seconds`; at most `most` tokens.

        A chunk of n costs token · n + chunk_attended · (n · start + n · (n + 1) / 2).
        """
        if seconds <= 0:
            return 0
        square, linear = self.chunk_attended / 2, self.token + self.chunk_attended * (start + 0.5)
        if linear * most + square * most * most <= seconds:
            return most
        # The root in the form that loses no digits where the square is nothing beside the linear term.
        return int(2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds)))


class StepCost:
    """Coefficients that follow what is measured."""

    def __init__(self, typical_seconds: float) -> None:
        """`typical_seconds`: steps far longer than this say little of those that are to be predicted."""
        self.coefficients = Coefficients()
        """All zero until something was measured."""
        self.longest_chunk = 0
        """Chunk tokens of the largest step so far: what is longer, nobody has seen."""
        self._typical_seconds = typical_seconds
        self._cells: dict[int, _Cell] = {}
        self._now = 0
        self._since_fit = 0

    def knows(self, shape: StepShape) -> bool:
        """Whether steps with chunks of about this size were measured often enough to be judged by."""
        cell = self._cells.get(_size_class(shape))
        return cell is not None and cell.count >= _KNOWN

    def observe(self, shape: StepShape, seconds: float) -> None:
        seconds = max(seconds, _SHORTEST_SECONDS)
        scale = seconds
        if self.knows(shape):
            # By the prediction, not by the measurement: weights by the latter would favour what came out short.
            scale = max(self.coefficients.seconds(shape), _SHORTEST_SECONDS)
            seconds = min(max(seconds, scale / _FARTHEST), scale * _FARTHEST)
        weight = min(1.0, self._typical_seconds / scale) ** 2
        row = (1, shape.chunk_tokens, shape.decodes, shape.decode_attended, shape.chunk_attended)
        self._now += 1
        cell = self._cells.setdefault(_size_class(shape), _Cell())
        cell.add([feature / scale for feature in row], seconds / scale, weight, self._now)
        self.longest_chunk = max(self.longest_chunk, shape.chunk_tokens)
        self._since_fit += 1
        if shape.chunk_tokens or self._since_fit >= _FIT_EVERY or self._now < _EARLY:
            self._fit()

    def _fit(self) -> None:
        self._since_fit = 0
        gram = [[0.0] * _WIDTH for _ in range(_WIDTH)]
        moments = [0.0] * _WIDTH
        for cell in self._cells.values():
            weight = max(_AGED, _AGEING ** (self._now - cell.last))
            for i in range(_WIDTH):
                moments[i] += weight * cell.moments[i]
                for j in range(i + 1):
                    gram[i][j] += weight * cell.gram[i][j]
        # In units in which every feature has the same length, so that the preference is a matter of share, not of unit.
        units = [math.sqrt(gram[i][i]) or 1.0 for i in range(_WIDTH)]
        scaled = [[gram[max(i, j)][min(i, j)] / (units[i] * units[j]) for j in range(_WIDTH)] for i in range(_WIDTH)]
        for i in range(_WIDTH):
            scaled[i][i] = 1.0 + _PREFERENCE[i]
        solution = solve_non_negative(scaled, [moments[i] / units[i] for i in range(_WIDTH)])
        self.coefficients = Coefficients(*(x / unit for x, unit in zip(solution, units, strict=True)))


_WIDTH = 5
_KNOWN = 4
_FARTHEST = 1.5
_SHORTEST_SECONDS = 1e-6
_FADING = 0.9
"""What a measurement's weight is multiplied by with each later one of its size class: about ten count."""
_AGEING, _AGED = 0.998, 0.05
"""The same with each later step of any kind, and how much of it stays for ever: nothing newer is known of that size."""
_FIT_EVERY = 16
_EARLY = 64
"""Mere decodes need no fit at each step, but for the first ones: they change little, and nothing waits for it."""
_PREFERENCE = (1e-5, 1e-6, 2e-3, 1e-3, 1e-3)
"""Small: only what measurements cannot tell apart is decided by it, and then for the cost of chunk tokens, or for what
every step costs before that of a decode: where one stream alone was ever open, eight would seem to take eight times as
long, and prompts beside them would starve."""


def _size_class(shape: StepShape) -> int:
    return shape.chunk_tokens.bit_length()


class _Cell:
    """The measurements of one size class, faded and added up."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0
        self.gram = [[0.0] * (i + 1) for i in range(_WIDTH)]
        """Lower half."""
        self.moments = [0.0] * _WIDTH

    def add(self, row: Sequence[float], target: float, weight: float, now: int) -> None:
        self.count += 1
        self.last = now
        for i, own in enumerate(self.gram):
            share = weight * row[i]
            self.moments[i] = _FADING * self.moments[i] + share * target
            for j in range(i + 1):
                own[j] = _FADING * own[j] + share * row[j]


def solve_non_negative(gram: Sequence[Sequence[float]], moments: Sequence[float]) -> list[float]:
    """The x ≥ 0 that minimises xᵀ·gram·x / 2 - momentsᵀ·x, for a positive definite gram.

    Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23: features come in one by one, the one that
    helps most first; one that would turn negative goes out again.
    """
    width = len(moments)
    x = [0.0] * width
    used: list[int] = []
    for _ in range(3 * width):  # ends earlier by itself; rounding must not make it turn in circles
        slope = [moments[i] - sum(gram[i][j] * x[j] for j in used) for i in range(width)]
        unused = [i for i in range(width) if i not in used]
        best = max(unused, key=slope.__getitem__, default=None)
        if best is None or slope[best] <= 1e-12:
            break
        used.append(best)
        while used:
            z = _solve([[gram[i][j] for j in used] for i in used], [moments[i] for i in used])
            if min(z) > 0:
                for i, value in zip(used, z, strict=True):
                    x[i] = value
                break
            back = min(x[i] / (x[i] - value) for i, value in zip(used, z, strict=True) if value <= 0)
            for i, value in zip(used, z, strict=True):
                x[i] += back * (value - x[i])
            out = min(used, key=x.__getitem__)
            x[out] = 0.0
            used.remove(out)
    return x


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Cholesky's way; overwrites both."""
    width = len(right)
    for i in range(width):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(matrix[i][k] * matrix[j][k] for k in range(j))
            matrix[i][j] = math.sqrt(max(rest, 1e-15)) if i == j else rest / matrix[j][j]
        right[i] = (right[i] - sum(matrix[i][k] * right[k] for k in range(i))) / matrix[i][i]
    for i in reversed(range(width)):
        right[i] = (right[i] - sum(matrix[k][i] * right[k] for k in range(i + 1, width))) / matrix[i][i]
    return right
