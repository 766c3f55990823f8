"""Moves KV blocks between workers by pull under lease, and owns their lifetimes while they move.

A source has a `SourceLedger` that offers blocks, behind a `TransferService`; a destination a `Puller` that lands them:

    ticket = ledger.offer(id, blocks, num_tokens)      # then seal… and prefilled, or abort
    landing = puller.land(ticket, id, blocks, first_missing)
    landed = await landing.done()
"""

from kvtransfer.destination import Puller
from kvtransfer.landing import Landed, Landing
from kvtransfer.lifetimes import DestinationState, SourceState
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.reservation import Prompt
from kvtransfer.service import TransferService
from kvtransfer.source import SourceLedger
from kvtransfer.ticket import Ticket

__all__ = [
    "DestinationState",
    "HostMemory",
    "Landed",
    "Landing",
    "PoolMemory",
    "Prompt",
    "Puller",
    "SourceLedger",
    "SourceState",
    "Ticket",
    "TransferService",
]
