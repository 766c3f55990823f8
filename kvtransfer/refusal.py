"""Why a set can't be pulled: the reasons, their form on the wire, the errors that a puller raises for them, and their
count."""

from __future__ import annotations

import logging
from enum import Enum

from baton.errors import HandoffFailed, LayoutMismatch, LeaseExpired, TransferRefused
from baton.logs import Rarely
from baton.metrics import TransferMetrics
from baton.v1 import transfer_pb2 as pb

log = logging.getLogger(__name__)

_MAX_MESSAGE = 500


class RefusalReason(Enum):
    UNKNOWN_TRANSFER = "unknown_transfer"
    STALE_INCARNATION = "stale_incarnation"
    LAYOUT_MISMATCH = "layout_mismatch"
    EXPIRED = "expired"
    ABORTED = "aborted"
    MALFORMED = "malformed"
    ALREADY_CLAIMED = "already_claimed"
    NOT_HELD = "not_held"


_TO_WIRE = {
    RefusalReason.UNKNOWN_TRANSFER: pb.REFUSAL_REASON_UNKNOWN_TRANSFER,
    RefusalReason.STALE_INCARNATION: pb.REFUSAL_REASON_STALE_INCARNATION,
    RefusalReason.LAYOUT_MISMATCH: pb.REFUSAL_REASON_LAYOUT_MISMATCH,
    RefusalReason.EXPIRED: pb.REFUSAL_REASON_EXPIRED,
    RefusalReason.ABORTED: pb.REFUSAL_REASON_ABORTED,
    RefusalReason.MALFORMED: pb.REFUSAL_REASON_MALFORMED,
    RefusalReason.ALREADY_CLAIMED: pb.REFUSAL_REASON_ALREADY_CLAIMED,
    RefusalReason.NOT_HELD: pb.REFUSAL_REASON_NOT_HELD,
}
_FROM_WIRE = {wire: reason for reason, wire in _TO_WIRE.items()}
_ERRORS: dict[RefusalReason, type[HandoffFailed]] = {
    RefusalReason.LAYOUT_MISMATCH: LayoutMismatch,
    RefusalReason.EXPIRED: LeaseExpired,
}


class Refusal(TransferRefused):
    """A source's no, on its way to the puller. Nothing has changed at the source."""

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def to_proto(self) -> pb.Refused:
        return pb.Refused(reason=_TO_WIRE[self.reason], message=self.message)


class Refusals:
    """Counts all and logs few: whoever sends what is refused must not be able to fill the log. Thread-safe."""

    def __init__(self, metrics: TransferMetrics) -> None:
        self._metrics = metrics
        self._rarely = Rarely(log)

    def note(self, reason: RefusalReason, message: str) -> None:
        self._metrics.refused.labels(reason=reason.value).inc()
        self._rarely.info(f"refused, {reason.value}", message)


def refusal_error(message: pb.Refused, source: str) -> HandoffFailed:
    """What a puller raises for a refusal by `source`."""
    reason = _FROM_WIRE.get(message.reason)
    said = message.message[:_MAX_MESSAGE] or "without a word"
    if reason is None:
        return TransferRefused(f"{source} refused for an unknown reason ({message.reason}): {said}")
    return _ERRORS.get(reason, TransferRefused)(f"{source} refused: {said}")
