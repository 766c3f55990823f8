"""Keeps the metrics of block sets in step with their lifetimes."""

from __future__ import annotations

from baton.metrics import TransferMetrics
from kvtransfer.lifetimes import LIVE, DestinationState, SourceState


def count_state(
    metrics: TransferMetrics,
    old: SourceState | DestinationState | None,
    new: SourceState | DestinationState,
) -> None:
    """A set went from `old` (None: it is new) to `new`. Live states are gauged, terminal ones counted."""
    if old is not None:
        metrics.transfers.labels(state=old.value).dec()
    if new.value in LIVE:
        metrics.transfers.labels(state=new.value).inc()
    else:
        metrics.ended.labels(state=new.value).inc()
