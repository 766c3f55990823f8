from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch

from baton.errors import ConfigError
from baton.layout import KVLayout
from engine.kv_cache import KVCache, choose_num_blocks
from engine.memory import room
from engine.plan import Move, MoveKind


def _layout(dtype: str = "bfloat16") -> KVLayout:
    return KVLayout(
        num_layers=2, num_kv_heads=3, block_size=4, head_dim=8, dtype=dtype, model_fingerprint=b"fingerprint-----"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pool_over_a_buffer_is_that_memory(dtype: str) -> None:
    layout = _layout(dtype)
    with mmap.mmap(-1, 5 * layout.block_bytes + 100) as buffer:
        cache = KVCache(layout, 5, buffer=memoryview(buffer))
        assert cache.tensor.shape == (5, 2, 2, 3, 4, 8)
        cache.tensor[3].fill_(1.5)
        block = bytearray(buffer[3 * layout.block_bytes : 4 * layout.block_bytes])
        assert torch.frombuffer(block, dtype=getattr(torch, dtype)).eq(1.5).all()
        assert buffer[: 3 * layout.block_bytes] == bytes(3 * layout.block_bytes)
        del cache  # or the mapping could not be closed


def test_blocks_travel_as_bytes() -> None:
    source, destination = KVCache(_layout(), 3), KVCache(_layout(), 3)
    source.tensor.normal_()
    data = bytes(source.bytes_of(0, 2).numpy())
    assert len(data) == 2 * _layout().block_bytes
    destination.bytes_of(1, 2).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert torch.equal(destination.tensor[1:], source.tensor[:2])
    assert destination.tensor[0].eq(0).all()


def test_poison_fills_one_block() -> None:
    cache = KVCache(_layout(), 3)
    cache.poison(1)
    assert cache.tensor[1].isnan().all()
    assert not cache.tensor[[0, 2]].isnan().any()


def test_swap_slots_take_no_memory_before_they_are_used() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE

    before = resident()
    slots = (256 << 20) // _layout().block_bytes
    cache = KVCache(_layout(), 1, num_swap_slots=slots)
    assert resident() - before < 64 << 20
    cache.move(Move(MoveKind.SWAP_OUT, 0, slots - 1))


_ROOM = room(torch.device("cpu"), 0.9, 0)


def test_the_pool_is_as_big_as_wanted_or_as_needed() -> None:
    assert choose_num_blocks(_layout(), 100, max_num_seqs=8, max_model_len=10, room=_ROOM) == 100
    assert choose_num_blocks(_layout(), 0, max_num_seqs=8, max_model_len=10, room=_ROOM) == 24


def test_the_pool_leaves_memory_to_others() -> None:
    blocks = choose_num_blocks(_layout(), 0, max_num_seqs=10**9, max_model_len=10**3, room=_ROOM)
    assert 250 <= blocks < 10**9


def test_more_blocks_than_memory_holds_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"MiB of memory are left on cpu; give at most --kv-blocks=\d+$"):
        choose_num_blocks(_layout(), 2**50, max_num_seqs=8, max_model_len=10, room=_ROOM)


def test_a_pool_without_room_for_a_block_is_refused() -> None:
    huge = replace(_layout(), head_dim=2**46)
    with pytest.raises(ConfigError, match=r"left for the KV pool on cpu, and one block takes \d+ bytes"):
        choose_num_blocks(huge, 0, max_num_seqs=8, max_model_len=10, room=_ROOM)
