"""What this machine can do in which time: how much of a prompt may ride along with open streams, so that their steps
keep the inter-token objective, and whether KV is sooner swapped or computed again.

The pacer learns from measured steps and gives out a `Pace`, which is plain data: the scheduler's plans depend on
nothing else that is measured, so the same commands and the same paces give the same plans. No torch, no clock.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from engine.step_cost import Coefficients, StepCost, StepShape

log = logging.getLogger(__name__)

LEAST_CHUNK = 16
"""Tokens by which prompts go on in every step, whatever the streams alone take."""
_ROUND = 8
"""Chunks that are cut are multiples of it: matrix kernels keep a plan for every size that they have met."""
_FIRST_CHUNK = 32
"""Where no chunk was measured yet. From there on a step may have twice what was seen."""
_LEARNING = 0.05
_FAR_OFF = 0.5
"""One error counts as no more."""
_LARGEST_MARGIN = 0.5
_STEPS_UNTIL_SURE = 16


@dataclass(frozen=True, slots=True)
class Pace:
    seconds: float
    """That a step with an open stream is planned to take at most."""
    most: int
    """Chunk tokens of a step."""
    cost: Coefficients
    swap_seconds: float = 0.0
    """To copy one block to or from host memory."""

    def chunk(self, planned: StepShape, start: int, wanted: int) -> int:
        """How many of `wanted` tokens from position `start` on may join what is planned."""
        if math.isinf(self.seconds):
            return wanted
        left = self.seconds - self.cost.seconds(planned)
        count = self.cost.tokens_within(left, start, max(0, self.most - planned.chunk_tokens))
        if count >= wanted:
            return wanted
        return min(wanted, max(LEAST_CHUNK - planned.chunk_tokens, count - count % _ROUND))


class Pacer:
    """Keeps most steps, not the average step, within the objective: it aims lower by twice the usual error."""

    def __init__(self, objective_seconds: float = math.inf) -> None:
        """Infinite: open streams limit no prompt."""
        self.objective_seconds = objective_seconds
        self.error = 0.1
        """How far chunks beside streams came out from the prediction, as a share of it, on average."""
        self._cost = StepCost(objective_seconds)
        self._swap_seconds = 0.0  # at first it seems to cost nothing; the first swap tells
        self._out_of_reach = 0
        self._said = False

    def pace(self) -> Pace:
        # The bound keeps a machine that is merely restless from starving its prompts.
        seconds = self.objective_seconds / (1 + min(2 * self.error, _LARGEST_MARGIN))
        most = max(_FIRST_CHUNK, 2 * self._cost.longest_chunk)
        return Pace(seconds, most, self._cost.coefficients, self._swap_seconds)

    def predict(self, shape: StepShape) -> float:
        """Seconds; 0 where nothing is known."""
        return self._cost.coefficients.seconds(shape)

    def observe_moves(self, count: int, seconds: float) -> None:
        one = seconds / count
        self._swap_seconds += (one - self._swap_seconds) * (_LEARNING if self._swap_seconds else 1.0)

    def observe(self, shape: StepShape, seconds: float) -> None:
        if shape.decodes and shape.chunk_tokens and self._cost.knows(shape):
            off = abs(seconds / max(self._cost.coefficients.seconds(shape), 1e-9) - 1)
            self.error += _LEARNING * (min(off, _FAR_OFF) - self.error)
        self._cost.observe(shape, seconds)
        self._watch_reach(shape)

    def _watch_reach(self, shape: StepShape) -> None:
        """Says once that nothing less can be planned and it still takes longer than the objective, when that lasts."""
        usual = self._cost.coefficients.seconds(shape)
        beyond = shape.decodes > 0 and shape.chunk_tokens <= LEAST_CHUNK and usual > self.objective_seconds
        self._out_of_reach = self._out_of_reach + 1 if beyond else 0
        if self._out_of_reach >= _STEPS_UNTIL_SURE and not self._said:
            self._said = True
            log.warning(
                "--itl-objective-ms is %g and cannot be met: a step takes about %.3g ms (open streams: %d). While that "
                "is so, prompts go on by %d tokens a step; raise the objective or lower --max-num-seqs",
                1000 * self.objective_seconds, 1000 * usual, shape.decodes, LEAST_CHUNK,
            )  # fmt: skip
