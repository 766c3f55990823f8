"""Tickets and claims from the network: bounds, messages, and nothing but a clear refusal for garbage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import LayoutMismatch, TransferRefused
from baton.ids import AttemptId, BlockHash, BlockIndex, BlockRef, Generation, Incarnation, TransferId, WorkerId
from baton.layout import KVLayout
from baton.v1 import transfer_pb2 as pb
from kvtransfer.checksum import ChecksumKind
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.service import check_claim
from kvtransfer.ticket import Ticket

LAYOUT = KVLayout(24, 4, 16, 64, "bfloat16", b"m" * 16, tp_size=2, tp_rank=1)
BLOCKS = tuple(BlockRef(BlockIndex(i * 3), Generation(2**40 + i), BlockHash(bytes([i]) * 32)) for i in range(4))
TICKET = Ticket(
    transfer_id=TransferId(b"s3cret-s3cret-16"),
    worker_id=WorkerId("prefill-0"),
    address="10.0.0.7:5000",
    incarnation=Incarnation(2**62 + 1),
    layout=LAYOUT,
    blocks=BLOCKS,
    lease_seconds=2.5,
    num_tokens=61,
    id=AttemptId("req-1", 3),
    checksum_kind=ChecksumKind.NH,
)


def test_a_ticket_survives_the_wire() -> None:
    assert Ticket.from_proto(pb.Ticket.FromString(TICKET.to_proto().SerializeToString())) == TICKET


def test_a_ticket_without_a_kind_of_checksum_means_what_it_meant() -> None:
    message = TICKET.to_proto()
    message.ClearField("checksum_kind")
    assert Ticket.from_proto(message) == replace(TICKET, checksum_kind=ChecksumKind.XXH3)


def test_a_kind_that_the_blocks_are_too_small_for_is_refused() -> None:
    odd = replace(TICKET, layout=KVLayout(1, 1, 1, 1, "bfloat16", b"m"), num_tokens=4)
    assert Ticket.from_proto(replace(odd, checksum_kind=ChecksumKind.XXH3).to_proto())
    with pytest.raises(TransferRefused, match="checksum_kind is NH; it must be XXH3 for blocks of 4 bytes"):
        Ticket.from_proto(odd.to_proto())


def test_a_transfer_id_shows_in_no_repr() -> None:
    assert "s3cret" not in repr(TICKET)


def change(**fields: object) -> Callable[[pb.Ticket], None]:
    def apply(message: pb.Ticket) -> None:
        for name, value in fields.items():
            setattr(message, name, value)

    return apply


def relaid(**fields: object) -> Callable[[pb.Ticket], None]:
    def apply(message: pb.Ticket) -> None:
        for name, value in fields.items():
            setattr(message.layout, name, value)

    return apply


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (change(transfer_id=b"short"), "transfer_id is 5 bytes long; it must be 16 bytes"),
        (change(layout_fingerprint=b""), "layout_fingerprint is 0 bytes long"),
        (change(worker_id=""), "worker_id is 0 characters long"),
        (change(request_id="x" * 257), "request_id is 257 characters long"),
        (change(address="nowhere"), "address is 'nowhere'; it must be host:port"),
        (change(address="host:0"), "must be host:port"),
        (change(address="host:65536"), "must be host:port"),
        (change(address=":80"), "must be host:port"),
        (change(address="a" * 600 + ":80"), "address is 603 characters long"),
        (change(incarnation=0), "incarnation is 0"),
        (lambda message: message.ClearField("layout"), "layout.num_layers is 0; it must be between 1 and 65536"),
        (relaid(num_kv_heads=65537), "layout.num_kv_heads is 65537"),
        (relaid(block_size=0), "layout.block_size is 0"),
        (relaid(tp_size=0), "layout.tp_size is 0"),
        (relaid(tp_size=3), "layout.tp_size is 3; it must divide the 4 KV heads"),
        (relaid(tp_rank=2), "layout.tp_rank is 2; it must be between 0 and 1"),
        (relaid(dtype="float8"), "layout.dtype is 'float8'; it must be float32 or bfloat16 or float16"),
        (relaid(model_fingerprint=b""), "layout.model_fingerprint's length is 0"),
        (relaid(head_dim=65536, block_size=65536), "layout.size of a block is 824633720832"),
        (change(lease_ms=0), "lease is 0 s"),
        (change(lease_ms=3_600_001), "lease is 3600 s; it must be above 0 and at most 3600 s"),
        (change(num_tokens=3), "num_tokens is 3; it must be at least one a block, 4"),
        (change(checksum_kind=3), "checksum_kind is 3; it must be 1 (XXH3) or 2 (NH)"),
        (lambda message: message.ClearField("blocks"), "number of blocks is 0"),
        (lambda message: message.blocks.extend([message.blocks[0]] * 65536), "number of blocks is 65540"),
        (lambda message: setattr(message.blocks[2], "hash", b"h" * 31), "hash of block 2 is 31 bytes long"),
        (lambda message: setattr(message.blocks[2], "index", 0), "names one block twice"),
    ],
)
def test_a_malformed_ticket_is_refused_by_name(spoil: Callable[[pb.Ticket], None], complaint: str) -> None:
    message = TICKET.to_proto()
    spoil(message)
    with pytest.raises(TransferRefused) as caught:
        Ticket.from_proto(message)
    assert complaint in caught.value.message
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize("spoil", [change(layout_fingerprint=b"f" * 16), relaid(block_size=8), relaid(dtype="float16")])
def test_a_layout_that_its_fingerprint_does_not_name_is_of_another_version(spoil: Callable[[pb.Ticket], None]) -> None:
    message = TICKET.to_proto()
    spoil(message)
    with pytest.raises(LayoutMismatch, match="must run versions of Baton that lay out blocks alike"):
        Ticket.from_proto(message)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_ticket_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(DecodeError, TransferRefused, LayoutMismatch):
        Ticket.from_proto(pb.Ticket.FromString(data))


@given(st.data())
def test_a_damaged_ticket_is_a_ticket_or_is_refused(data: st.DataObject) -> None:
    wire = bytearray(TICKET.to_proto().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError, TransferRefused, LayoutMismatch):
        Ticket.from_proto(pb.Ticket.FromString(bytes(wire)))


@given(
    transfer_id=st.binary(max_size=20),
    fingerprint=st.binary(max_size=20),
    request_id=st.text(max_size=300),
    worker_id=st.text(max_size=300),
    transports=st.lists(st.text(max_size=8), max_size=20),
)
def test_a_claim_passes_only_within_its_bounds(
    transfer_id: bytes, fingerprint: bytes, request_id: str, worker_id: str, transports: list[str]
) -> None:
    claim = pb.Claim(
        transfer_id=transfer_id,
        layout_fingerprint=LAYOUT.fingerprint if len(fingerprint) == 16 else fingerprint,
        layout=LAYOUT.to_proto(),
        request_id=request_id,
        worker_id=worker_id,
        transports=transports,
    )
    right = (
        len(transfer_id) == 16
        and len(fingerprint) == 16
        and 0 < len(request_id) <= 256
        and 0 < len(worker_id) <= 256
        and len(transports) <= 16
    )
    if right:
        check_claim(claim)
    else:
        with pytest.raises(Refusal) as caught:
            check_claim(claim)
        assert caught.value.reason is RefusalReason.MALFORMED
