"""What a landing is for: the blocks that the engine reserved, and whether a ticket offers just what belongs there.

Pure but for the generations that it reads. Names are compared whole, one for each block, so nothing lands that another
prompt, model or tenant left behind; where the source's blocks have another size, they are named anew from the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import LayoutMismatch, TransferRefused, VerifyFailed
from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId, BlockHash, BlockRef
from baton.layout import KVLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prompt's blocks are named by, beside the model."""

    token_ids: Sequence[int]
    salt: bytes = b""

    def names(self, layout: KVLayout) -> list[BlockHash]:
        """Of its blocks in `layout`; the last may be that of a part full one."""
        root = root_hash(layout.model_fingerprint, salt=self.salt)
        return block_hashes(root, self.token_ids, layout.block_size, partial=True)


@dataclass(frozen=True, slots=True)
class Reservation:
    id: AttemptId
    blocks: Sequence[BlockRef]
    """In the order of the prompt, with the names that are expected."""
    first_missing: int
    """Blocks before this position hold their KV already."""
    prompt: Prompt | None
    """Where it is unknown, blocks of another size can't be told and are refused."""

    def check_offer(self, ticket: Ticket, layout: KVLayout) -> None:
        """Whether `ticket` offers what `blocks`, of `layout`, are reserved for. Raises LayoutMismatch, VerifyFailed or
        TransferRefused."""
        if ticket.id != self.id:
            raise TransferRefused(f"the ticket is for {ticket.id}; the blocks are reserved for {self.id}")
        size = ticket.layout.block_size
        if -(-ticket.num_tokens // size) != len(ticket.blocks):
            raise VerifyFailed(
                f"the ticket names {len(ticket.blocks)} blocks of {size} tokens for {ticket.num_tokens} tokens"
            )
        expected = self._names(ticket.layout, layout)
        if len(ticket.blocks) != len(expected) or not 0 <= self.first_missing <= len(self.blocks):
            raise VerifyFailed(
                f"the ticket names {len(ticket.blocks)} blocks of {size} tokens; the prompt has {len(expected)}, and "
                f"of {len(self.blocks)} that are reserved those from {self.first_missing} on are missing"
            )
        for position, (offered, name) in enumerate(zip(ticket.blocks, expected, strict=True)):
            if offered.hash != name:
                raise VerifyFailed(
                    f"block {position} is offered as {offered.hash.hex()[:16]}; expected is {name.hex()[:16]}"
                )

    def check_generations(self, memory: PoolMemory) -> None:
        """A defect here would let one stream's blocks be written by another's landing. Raises VerifyFailed."""
        for block in self.blocks[self.first_missing :]:
            if memory.generation(block.index) != block.generation:
                raise VerifyFailed(
                    f"reserved block {block.index} is of generation {memory.generation(block.index)}, "
                    f"not {block.generation}: it was given to another use"
                )

    def _names(self, source: KVLayout, layout: KVLayout) -> Sequence[BlockHash]:
        if source.block_size == layout.block_size:
            return [block.hash for block in self.blocks]
        if self.prompt is None:
            raise LayoutMismatch(
                f"the source's blocks have {source.block_size} tokens, these {layout.block_size}, and the prompt by "
                "which they could be compared is not known"
            )
        return self.prompt.names(source)
