"""The tcp transport's frames under any bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import TransferId
from kvtransfer.transports import frames
from kvtransfer.transports.base import MAX_FETCH_BLOCKS, Want
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus

U64 = st.integers(0, 2**64 - 1)


@given(st.binary(min_size=16, max_size=16), U64, st.lists(st.tuples(U64, U64), min_size=1, max_size=20))
def test_a_request_survives_the_wire(transfer_id: bytes, block_bytes: int, blocks: list[tuple[int, int]]) -> None:
    wire = frames.pack_request(TransferId(transfer_id), block_bytes, [Want(i, g, 0) for i, g in blocks])
    request = frames.parse_request(wire[: frames.REQUEST.size])
    assert request == (transfer_id, block_bytes, len(blocks))
    assert frames.parse_wanted(wire[frames.REQUEST.size :]) == blocks


@given(st.binary(min_size=frames.REQUEST.size, max_size=frames.REQUEST.size))
def test_any_bytes_are_no_request(data: bytes) -> None:
    with pytest.raises(FrameError):
        frames.parse_request(data)


@given(st.integers(0, frames.REQUEST.size - 1), st.integers(0, 255))
def test_a_damaged_request_stays_within_its_bounds(at: int, value: int) -> None:
    wire = bytearray(frames.pack_request(TransferId(bytes(16)), 4096, [Want(1, 2, 3)])[: frames.REQUEST.size])
    wire[at] = value
    with contextlib.suppress(FrameError):
        assert 0 < frames.parse_request(wire).num_blocks <= MAX_FETCH_BLOCKS


@pytest.mark.parametrize("count", [0, MAX_FETCH_BLOCKS + 1, 2**32 - 1])
def test_the_number_of_blocks_is_bounded(count: int) -> None:
    wire = bytearray(frames.pack_request(TransferId(bytes(16)), 4096, [Want(1, 2, 3)])[: frames.REQUEST.size])
    wire[8:12] = count.to_bytes(4, "little")
    with pytest.raises(FrameError, match=f"a request for {count} blocks"):
        frames.parse_request(wire)


@given(st.binary(min_size=frames.REPLY.size, max_size=frames.REPLY.size), st.integers(1, MAX_FETCH_BLOCKS))
def test_any_bytes_are_no_reply(data: bytes, count: int) -> None:
    with pytest.raises(FrameError):
        frames.parse_reply(data, count)


@given(st.sampled_from(ReplyStatus), st.integers(0, 9), st.integers(1, 9))
def test_a_reply_is_taken_only_if_it_answers_the_request(status: ReplyStatus, count: int, asked: int) -> None:
    right = count == asked if status is ReplyStatus.OK else count == 0
    if right:
        assert frames.parse_reply(frames.pack_reply(status, count), asked) is status
    else:
        with pytest.raises(FrameError, match=f"a reply of {count} blocks to a request for {asked}"):
            frames.parse_reply(frames.pack_reply(status, count), asked)


@given(st.binary(min_size=4, max_size=4))
def test_a_block_status_is_known_or_refused(data: bytes) -> None:
    value = int.from_bytes(data, "little")
    if value in set(BlockStatus):
        assert frames.parse_status(data) == value
    else:
        with pytest.raises(FrameError):
            frames.parse_status(data)
