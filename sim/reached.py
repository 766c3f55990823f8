"""Which of the states that matter a run has been in: a simulator in which nothing happens finds nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from engine.plan import MoveKind
from kvtransfer.lifetimes import DestinationState, SourceState
from sim.figures import count_of

if TYPE_CHECKING:
    from sim.network import Network
    from sim.router import RouterLife
    from sim.worker import Life

_KEEP = "/baton.v1.Transfer/Keep"


@dataclass
class Reached:
    """How often."""

    preemptions: int = 0
    swaps: int = 0
    """Blocks that went to host memory."""
    quarantines: int = 0
    """Landings that were given up with a writer about."""
    landings: int = 0
    leases_expired: int = 0
    offers_aborted: int = 0
    pulled_again: int = 0
    """Blocks, after a bad checksum."""
    reservations_waited: int = 0
    """Times that an offer was kept alive for a reservation that had no room."""
    resumed: int = 0
    """Times a request went on elsewhere."""
    stale_messages: int = 0
    fetched: int = 0
    """Prefixes that came from another worker."""
    moved: int = 0
    """Streams that went on elsewhere because their worker was draining."""
    relaid: int = 0
    """Bytes that came in another layout."""

    @classmethod
    def of(cls, workers: Iterable[Life], routers: Iterable[RouterLife], network: Network) -> Reached:
        """Of all lives there were."""
        reached = cls(reservations_waited=network.asked[_KEEP])
        for worker in workers:
            reached._add_worker(worker)
        for router in routers:
            reached.resumed += count_of(router.metrics.requests_resumed)
            reached.moved += count_of(router.metrics.requests_moved)
        return reached

    def _add_worker(self, life: Life) -> None:
        transfers = life.transfers
        self.preemptions += life.engine.scheduler.counters.preemptions
        self.swaps += life.runner.moved[MoveKind.SWAP_OUT]
        self.pulled_again += count_of(transfers.verify_failures, "checksum")
        self.leases_expired += count_of(transfers.ended, SourceState.EXPIRED.value)
        self.offers_aborted += count_of(transfers.ended, SourceState.ABORTED.value)
        self.landings += count_of(transfers.ended, DestinationState.COMMITTED.value)
        self.quarantines += count_of(transfers.transfers, DestinationState.QUARANTINED.value)
        self.stale_messages += count_of(life.worker_metrics.stale_messages)
        self.fetched += count_of(life.worker_metrics.prefix_fetches, "landed")
        self.relaid += count_of(transfers.relaid_bytes)

    def states(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
