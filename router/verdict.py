"""What an attempt's events mean for its request. Pure: reads arrivals, keeps the token log, does no I/O.

An attempt on two workers has two sides, and each ends for itself:

    side      ended as                      the request
    PREFILL   PREFILLED                     goes on: the decode side has the rest
    PREFILL   STOP, LENGTH                  is finished: the first token was the last
    DECODE    STOP, LENGTH                  is finished, once all tokens up to there have arrived
    either    INVALID, DEADLINE             fails
    either    HANDOFF_FAILED, UNAVAILABLE,  goes on elsewhere, from the tokens it has
              CANCELLED (nobody asked), lost
    DECODE    MOVED                         goes on elsewhere, with the blocks that this worker offers

A prefill side that goes after the blocks have landed takes nothing with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from baton.errors import BatonError, DeadlineExceeded, InternalError, InvalidRequest
from baton.v1 import transfer_pb2
from router.events import (
    Arrival,
    DeadlinePassed,
    DrainBegan,
    Ended,
    EndReason,
    Landed,
    Lost,
    Offered,
    Side,
    Tokens,
)
from router.merge import TokenLog
from router.request import FinishReason


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    side: Side
    """Which side's token was the last."""


@dataclass(frozen=True, slots=True)
class Retry:
    """This attempt is over; another may do better."""

    blamed: Side
    """Which worker to leave alone for a while."""
    message: str
    moved: bool = False
    """Nothing was lost: the worker drains."""
    ticket: transfer_pb2.Ticket | None = None
    """Of what it has computed, where it moves and has computed anything."""


@dataclass(frozen=True, slots=True)
class Fail:
    error: BatonError


Verdict = Finish | Retry | Fail


class _Effect(Enum):
    NONE = auto()
    STOP = auto()
    LENGTH = auto()
    RETRY = auto()
    RETRY_WITHOUT_SOURCE = auto()
    INVALID = auto()
    DEADLINE = auto()
    MOVE = auto()
    DEFECT = auto()


_P, _D = Side.PREFILL, Side.DECODE
_EFFECTS = {
    (_P, EndReason.STOP): _Effect.STOP,
    (_P, EndReason.LENGTH): _Effect.LENGTH,
    (_P, EndReason.PREFILLED): _Effect.NONE,
    (_P, EndReason.CANCELLED): _Effect.RETRY,
    (_P, EndReason.DEADLINE): _Effect.DEADLINE,
    (_P, EndReason.INVALID): _Effect.INVALID,
    (_P, EndReason.HANDOFF_FAILED): _Effect.RETRY_WITHOUT_SOURCE,
    (_P, EndReason.UNAVAILABLE): _Effect.RETRY,
    (_P, EndReason.MOVED): _Effect.DEFECT,
    (_D, EndReason.STOP): _Effect.STOP,
    (_D, EndReason.LENGTH): _Effect.LENGTH,
    (_D, EndReason.PREFILLED): _Effect.DEFECT,
    (_D, EndReason.CANCELLED): _Effect.RETRY,
    (_D, EndReason.DEADLINE): _Effect.DEADLINE,
    (_D, EndReason.INVALID): _Effect.INVALID,
    (_D, EndReason.HANDOFF_FAILED): _Effect.RETRY_WITHOUT_SOURCE,
    (_D, EndReason.UNAVAILABLE): _Effect.RETRY,
    (_D, EndReason.MOVED): _Effect.MOVE,
}
_COMPUTED = (EndReason.PREFILLED, EndReason.STOP, EndReason.LENGTH)
_FINISHES = {_Effect.STOP: FinishReason.STOP, _Effect.LENGTH: FinishReason.LENGTH}


class AttemptState:
    def __init__(self, log: TokenLog, *, remote: bool) -> None:
        """`remote`: a prefill worker takes part."""
        self._log = log
        self._remote = remote
        self._ended: dict[Side, EndReason] = {}
        self._reported = {Side.PREFILL: len(log), Side.DECODE: len(log)}
        self._finish: Finish | None = None
        self.landed: Landed | None = None
        self.decode_spoke = False
        self._moved_ticket: transfer_pb2.Ticket | None = None
        self.cached_tokens = 0
        """Of the prompt, where it is computed: found cached. What a receiving side finds saves bytes, not computing."""

    @property
    def handed_over(self) -> bool:
        """Whether the decode side has all that it needs of the prefill side. A first token from it says so, too."""
        return not self._remote or self.landed is not None or self.decode_spoke

    @property
    def cancel_prefill(self) -> bool:
        """Whether the prefill side may still hold something: also after its end, blocks that nobody came for."""
        ended = self._ended.get(Side.PREFILL)
        return ended is None or (ended in _COMPUTED and not self.handed_over)

    @property
    def cancel_decode(self) -> bool:
        return Side.DECODE not in self._ended

    def take(self, arrival: Arrival) -> Verdict | None:
        """None while the attempt goes on."""
        match arrival.event:
            case Tokens() as tokens:
                verdict = self._take_tokens(arrival.side, tokens)
            case Ended() as ended:
                verdict = self._take_end(arrival.side, ended)
            case Landed() as landed:
                if arrival.side is Side.DECODE:
                    self.landed = landed
                verdict = None
            case Offered(ticket):
                if arrival.side is Side.DECODE:
                    self._moved_ticket = ticket
                verdict = None
            case DrainBegan():
                verdict = None
            case Lost(message):
                verdict = self._take_loss(arrival.side, message)
            case DeadlinePassed():
                verdict = Fail(DeadlineExceeded(f"the deadline passed after {len(self._log)} tokens"))
        return verdict or self._finish_if_complete()

    def _take_tokens(self, side: Side, tokens: Tokens) -> Verdict | None:
        self.decode_spoke |= side is Side.DECODE
        if side is Side.PREFILL or not self._remote:
            self.cached_tokens = max(self.cached_tokens, tokens.cached_tokens)
        self._reported[side] = max(self._reported[side], tokens.index + len(tokens.token_ids))
        try:
            self._log.add(tokens.index, tokens.token_ids)
        except InternalError as error:
            return Fail(error)
        return None

    def _take_loss(self, side: Side, message: str) -> Verdict | None:
        if side is Side.PREFILL and self.handed_over:
            self._ended.setdefault(side, EndReason.CANCELLED)
            return None
        return Retry(side, message)

    def _take_end(self, side: Side, ended: Ended) -> Verdict | None:
        self._ended[side] = ended.reason
        effect = _EFFECTS[side, ended.reason]
        message = ended.message or f"the {side.value} worker ended it as {ended.reason.name}"
        if effect in _FINISHES:
            self._finish = self._finish or Finish(_FINISHES[effect], side)
        elif effect is _Effect.INVALID:
            return Fail(InvalidRequest(message))
        elif effect is _Effect.DEADLINE:
            return Fail(DeadlineExceeded(f"the deadline passed after {len(self._log)} tokens"))
        elif effect is _Effect.MOVE:
            return Retry(side, message, moved=True, ticket=self._moved_ticket)
        elif effect is _Effect.DEFECT:
            return Fail(InternalError(f"the {side.value} worker ended a request as {ended.reason.name}"))
        elif side is Side.PREFILL and self.handed_over:
            return None
        elif effect is _Effect.RETRY_WITHOUT_SOURCE:
            return Retry(Side.PREFILL if self._remote else side, message)
        elif effect is _Effect.RETRY:
            return Retry(side, message)
        return None

    def _finish_if_complete(self) -> Verdict | None:
        if self._finish is None:
            return None
        if len(self._log) >= self._reported[self._finish.side]:
            return self._finish
        if not self._remote or len(self._ended) == 2:  # nobody is left to fill the gap
            return Retry(self._finish.side, f"the answer has a gap behind token {len(self._log) - 1}")
        return None
