"""Moves KV blocks between workers by pull under lease, and owns their lifetimes while they move.

A worker makes one `TransferNode`. Its `ledger` offers blocks, its `puller` lands them:

    node = TransferNode(memory=HostMemory.create(num_blocks, layout.block_bytes), layout=layout, …)
    ticket = node.ledger.offer(id, blocks, num_tokens)      # then seal… and prefilled, or abort
    landing = node.puller.land(ticket, id, blocks, first_missing)
    landed = await landing.done()
"""

from kvtransfer.destination import Puller
from kvtransfer.landing import Landed, Landing
from kvtransfer.lifetimes import DestinationState, SourceState
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.node import TransferNode
from kvtransfer.source import SourceLedger
from kvtransfer.ticket import Ticket

__all__ = [
    "DestinationState",
    "HostMemory",
    "Landed",
    "Landing",
    "PoolMemory",
    "Puller",
    "SourceLedger",
    "SourceState",
    "Ticket",
    "TransferNode",
]
