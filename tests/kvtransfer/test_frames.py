"""The tcp transport's frames under any bytes."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import TransferId
from kvtransfer.transports import frames
from kvtransfer.transports.base import MAX_FETCH_BLOCKS, Want
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus
from kvtransfer.transports.tcp_server import neighbours

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


@given(st.one_of(st.binary(max_size=9), st.lists(st.sampled_from(BlockStatus), max_size=9).map(bytes)))
def test_block_statuses_are_known_or_refused(data: bytes) -> None:
    if set(data) <= set(BlockStatus):
        assert frames.parse_statuses(data) == list(data)
    else:
        with pytest.raises(FrameError):
            frames.parse_statuses(data)


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 5))
def test_runs_of_neighbours_say_the_same_as_their_numbers(indices: list[int], most: int) -> None:
    runs = list(neighbours(indices, most))
    assert [first + i for first, count in runs for i in range(count)] == indices
    assert all(1 <= count <= most for _, count in runs)
    assert all(first + count != following or count == most for (first, count), (following, _) in pairwise(runs))
