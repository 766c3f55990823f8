"""The Transfer service: a source's Pull streams, in front of its ledger.

It checks every message before the ledger sees it, and owns nothing but the stream. A stream that breaks changes
nothing: the puller may claim again until its lease runs out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

from baton.errors import LayoutMismatch, TransferRefused
from baton.ids import AttemptId, TransferId, WorkerId
from baton.layout import KVLayout
from baton.metrics import TransferMetrics
from baton.v1 import transfer_pb2 as pb
from baton.v1 import transfer_pb2_grpc
from kvtransfer.lend import Lender, LendRequest, lend_nothing
from kvtransfer.refusal import Refusal, RefusalReason, Refusals
from kvtransfer.source import Claimant, ClaimRequest, Prefilled, SourceLedger
from kvtransfer.ticket import (
    FINGERPRINT_BYTES,
    MAX_REQUEST_ID,
    MAX_WORKER_ID,
    TRANSFER_ID_BYTES,
    check_length,
    check_name,
    to_ms,
)
from kvtransfer.transports.base import Endpoint

log = logging.getLogger(__name__)

CLAIM_SECONDS = 10.0
"""How long a stream may take to say what it wants."""
GOODBYE_SECONDS = 1.0
"""How long a puller that was refused may take to hang up."""
MAX_TRANSPORTS = 16
_QUEUED = 64  # announcements ahead of a slow stream


class TransferService(transfer_pb2_grpc.TransferServicer):
    def __init__(
        self,
        ledger: SourceLedger,
        endpoints: Callable[[], Sequence[Endpoint]],
        metrics: TransferMetrics,
        lend: Lender = lend_nothing,
        *,
        claim_seconds: float = CLAIM_SECONDS,
    ) -> None:
        """`endpoints` are the ways to the ledger's bytes, best first; `lend` offers in the ledger what is cached."""
        self._ledger = ledger
        self._endpoints = endpoints
        self._lend = lend
        self._refusals = Refusals(metrics)
        self._claim_seconds = claim_seconds

    async def Pull(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.PullResponse]:
        requests = cast(AsyncIterator[pb.PullRequest], request_iterator)
        try:
            claim = await self._first(requests)
            claimant = self._ledger.claim(claim)
        except Refusal as refusal:
            yield self._refuse(refusal)
            await _until_hung_up(_skip(requests))
            return
        except StopAsyncIteration:
            return  # gone without a word
        yield self._claimed()
        replies: asyncio.Queue[pb.PullResponse | Refusal | None] = asyncio.Queue(_QUEUED)
        listener = asyncio.create_task(self._listen(requests, claimant, replies))
        announcer = asyncio.create_task(self._announce(claimant, replies))
        try:
            while (reply := await replies.get()) is not None:
                if isinstance(reply, Refusal):
                    yield self._refuse(reply)
                    await _until_hung_up(listener)
                    return
                yield reply
        finally:
            listener.cancel()
            announcer.cancel()
            await asyncio.gather(listener, announcer, return_exceptions=True)

    async def Keep(self, request: pb.KeepRequest, context: Any) -> pb.KeepResponse:
        try:
            self._ledger.keep(TransferId(request.transfer_id), request.incarnation)
        except Refusal as refusal:
            self._refusals.note(refusal.reason, refusal.message)
            return pb.KeepResponse(refused=refusal.to_proto())
        return pb.KeepResponse(renewed=pb.Renewed(lease_ms=to_ms(self._ledger.lease_seconds)))

    async def Lend(self, request: pb.LendRequest, context: Any) -> pb.LendResponse:
        try:
            ticket = await self._lend(LendRequest.from_proto(request))
        except Refusal as refusal:
            self._refusals.note(refusal.reason, refusal.message)
            return pb.LendResponse(refused=refusal.to_proto())
        return pb.LendResponse(ticket=ticket.to_proto())

    async def _first(self, requests: AsyncIterator[pb.PullRequest]) -> ClaimRequest:
        try:
            message = await asyncio.wait_for(anext(requests), self._claim_seconds)
        except TimeoutError:
            raise Refusal(RefusalReason.MALFORMED, f"no claim came within {self._claim_seconds:g} s") from None
        if message.WhichOneof("message") != "claim":
            said = message.WhichOneof("message") or "nothing known"
            raise Refusal(RefusalReason.MALFORMED, f"the first message is {said}; it must be a claim")
        return check_claim(message.claim)

    def _claimed(self) -> pb.PullResponse:
        endpoints = [pb.Endpoint(transport=e.transport, address=e.address) for e in self._endpoints()]
        return pb.PullResponse(claimed=pb.Claimed(endpoints=endpoints, lease_ms=to_ms(self._ledger.lease_seconds)))

    async def _listen(
        self,
        requests: AsyncIterator[pb.PullRequest],
        claimant: Claimant,
        replies: asyncio.Queue[pb.PullResponse | Refusal | None],
    ) -> None:
        """Hears the puller until it releases, breaks off or breaks the protocol."""
        try:
            async for message in requests:
                match message.WhichOneof("message"):
                    case "renew":
                        self._ledger.renew(claimant)
                        lease_ms = to_ms(self._ledger.lease_seconds)
                        await replies.put(pb.PullResponse(renewed=pb.Renewed(lease_ms=lease_ms)))
                    case "release":
                        self._ledger.release(claimant)
                        break
                    case said:
                        raise Refusal(
                            RefusalReason.MALFORMED,
                            f"behind a claim came {said or 'nothing known'}; it must be a renewal or the release",
                        )
            await replies.put(None)
        except Refusal as refusal:
            await replies.put(refusal)
            await _skip(requests)
        except Exception:  # what a broken stream raises is gRPC's own business
            log.debug("%s: its puller's stream broke", claimant.offered.ticket.id, exc_info=True)
            await replies.put(None)

    async def _announce(self, claimant: Claimant, replies: asyncio.Queue[pb.PullResponse | Refusal | None]) -> None:
        """Tells of each sealed block in order, then the first token. Waits where the puller doesn't read."""
        try:
            while (news := await self._ledger.announcement(claimant)) is not None:
                if isinstance(news, Prefilled):
                    await replies.put(pb.PullResponse(prefilled=pb.Prefilled(token_id=news.first_token)))
                else:
                    sealed = [pb.SealedBlock(position=p, checksum=c) for p, c in news]
                    await replies.put(pb.PullResponse(sealed=pb.Sealed(blocks=sealed)))
        except Refusal as refusal:
            await replies.put(refusal)
        except Exception:
            log.exception("%s: its blocks can't be announced, so its stream ends", claimant.offered.ticket.id)
            await replies.put(None)

    def _refuse(self, refusal: Refusal) -> pb.PullResponse:
        self._refusals.note(refusal.reason, refusal.message)
        return pb.PullResponse(refused=refusal.to_proto())


async def _until_hung_up(listening: Awaitable[None]) -> None:
    """After a refusal the puller hangs up first: a message of its own that met a stream which has ended already would
    fail there, and take the refusal with it."""
    try:
        await asyncio.wait_for(listening, GOODBYE_SECONDS)
    except Exception:  # it takes too long, or gRPC says in its own way that it broke off
        log.debug("a refused puller did not hang up", exc_info=True)


async def _skip(requests: AsyncIterator[pb.PullRequest]) -> None:
    async for _ in requests:
        pass


def check_claim(claim: pb.Claim) -> ClaimRequest:
    """Raises Refusal, naming what is wrong."""
    try:
        check_length("transfer_id", claim.transfer_id, TRANSFER_ID_BYTES)
        check_length("layout_fingerprint", claim.layout_fingerprint, FINGERPRINT_BYTES)
        check_name("request_id", claim.request_id, MAX_REQUEST_ID)
        check_name("worker_id", claim.worker_id, MAX_WORKER_ID)
        if len(claim.transports) > MAX_TRANSPORTS:
            raise TransferRefused(f"{len(claim.transports)} transports are named; at most {MAX_TRANSPORTS}")
        layout = KVLayout.from_proto(claim.layout, claim.layout_fingerprint)
    except LayoutMismatch as error:
        raise Refusal(RefusalReason.LAYOUT_MISMATCH, error.message) from None
    except TransferRefused as error:
        raise Refusal(RefusalReason.MALFORMED, error.message) from None
    return ClaimRequest(
        transfer_id=TransferId(claim.transfer_id),
        incarnation=claim.incarnation,
        id=AttemptId(claim.request_id, claim.attempt),
        layout=layout,
        first_block=claim.first_block,
        worker_id=WorkerId(claim.worker_id),
    )
