"""Re-laying alone, without a network: whatever the two layouts, each value is where the destination's says it is."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import LayoutMismatch, VerifyFailed
from baton.layout import KVLayout
from kvtransfer.convert import STORAGE, Array, converter
from kvtransfer.memory import HostMemory
from kvtransfer.relayout import Relayout, shares

MODEL = KVLayout(num_layers=2, num_kv_heads=4, block_size=16, head_dim=3, dtype="float32", model_fingerprint=b"m" * 16)
UNTOUCHED = 0xA5


class HiddenMemory(HostMemory):
    """As a device's: the host gets copies alone."""

    def view(self, index: int, count: int = 1) -> None:  # type: ignore[override]  # the protocol allows it
        return

    def read(self, index: int, count: int = 1) -> memoryview:
        view = super().view(index, count)
        return memoryview(bytes(view))

    def write(self, index: int, data: memoryview) -> None:
        super().view(index, len(data) // self.block_bytes)[:] = data


def layouts(tp: int) -> st.SearchStrategy[KVLayout]:
    """Of rank 0 of `tp`."""
    return st.builds(
        lambda block_size, dtype: replace(MODEL, block_size=block_size, dtype=dtype, tp_size=tp),
        st.sampled_from([1, 2, 3, 4, 8, 12, 16, 32]),
        st.sampled_from(list(STORAGE)),
    )


def kv_of(num_tokens: int, dtype: str, seed: int = 0) -> Array:
    """`[num_layers, 2, heads, tokens, head_dim]`, of values that `dtype` holds."""
    shape = (MODEL.num_layers, 2, MODEL.num_kv_heads, num_tokens, MODEL.head_dim)
    return as_dtype(np.random.default_rng(seed).standard_normal(shape, np.float32), "float32", dtype)


def as_dtype(values: Array, source: str, destination: str) -> Array:
    out = np.empty(values.shape, STORAGE[destination])
    converter(source, destination)(values, out)
    return out


def lay(kv: Array, layout: KVLayout, num_blocks: int) -> HostMemory:
    """A pool that holds `kv` block by block: laid out directly, for comparison and as a source."""
    memory = HostMemory.create(num_blocks, layout.block_bytes)
    memory.blocks[:] = bytes([UNTOUCHED]) * len(memory.blocks)
    for index in range(num_blocks):
        block = array(memory, index, layout)
        part = kv[:, :, layout.heads.start : layout.heads.stop, index * layout.block_size :][
            :, :, :, : layout.block_size
        ]
        block[:, :, :, : part.shape[3]] = part
    return memory


def array(memory: HostMemory, index: int, layout: KVLayout) -> Array:
    view = HostMemory.view(memory, index)
    return np.frombuffer(view, STORAGE[layout.dtype]).reshape(layout.block_shape)


def blocks_of(num_tokens: int, layout: KVLayout) -> int:
    return -(-num_tokens // layout.block_size)


def ranks(layout: KVLayout) -> list[KVLayout]:
    return [replace(layout, tp_rank=rank) for rank in range(layout.tp_size)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_relaid_pool_is_the_pool_that_was_laid_out_so(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from([1, 2, 4, 8]).flatmap(layouts))
    destination = data.draw(st.sampled_from([1, 2, 4, 8]).flatmap(layouts))
    destination = replace(destination, tp_rank=data.draw(st.integers(0, destination.tp_size - 1)))
    num_tokens = data.draw(st.integers(1, 70))
    count = blocks_of(num_tokens, destination)
    first_missing = data.draw(st.integers(0, count))
    kv = kv_of(num_tokens, source.dtype)
    wanted = lay(as_dtype(kv, source.dtype, destination.dtype), destination, count)
    kind = data.draw(st.sampled_from([HostMemory, HiddenMemory]))
    landed = kind.create(count, destination.block_bytes)
    landed.blocks[:] = bytes([UNTOUCHED]) * len(landed.blocks)
    places = data.draw(st.permutations(range(count)))
    lock = threading.Lock()
    held = [shard for shard in ranks(source) if set(shard.heads) & set(destination.heads)]
    for share in shares(held, destination):
        pool = lay(kv, share.source, blocks_of(num_tokens, source))
        relayout = Relayout(share, landed, places, first_missing, num_tokens, lock)
        needed = list(range(relayout.first_block, pool.num_blocks))
        while needed:  # in batches of any size, in any order
            batch = data.draw(st.lists(st.sampled_from(needed), min_size=1, max_size=6, unique=True))
            relayout.relay({position: pool.view(position) for position in batch})
            needed = [position for position in needed if position not in batch]
    for position in range(count):
        block = array(landed, places[position], destination)
        if position < first_missing:
            assert bytes(HostMemory.view(landed, places[position])) == bytes([UNTOUCHED]) * destination.block_bytes
        else:
            assert (block.view(np.uint8) == array(wanted, position, destination).view(np.uint8)).all()


@given(st.sampled_from([1, 2, 3, 5, 8, 16, 32, 48]), st.sampled_from([1, 4, 8, 16, 32]), st.integers(0, 6))
def test_only_source_blocks_that_something_is_missing_of_are_needed(from_size: int, to_size: int, missing: int) -> None:
    source, destination = replace(MODEL, block_size=from_size), replace(MODEL, block_size=to_size)
    memory = HostMemory.create(8, destination.block_bytes)
    [share] = shares([source], destination)
    num_tokens = 6 * to_size + 1
    relayout = Relayout(share, memory, range(7), missing, num_tokens, threading.Lock())
    first = relayout.first_block
    assert first * from_size <= missing * to_size < (first + 1) * from_size
    none = Relayout(share, memory, range(7), 7, num_tokens, threading.Lock())
    assert none.first_block == blocks_of(num_tokens, source)


@pytest.mark.parametrize("through", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_there_and_back_is_the_same_where_nothing_is_rounded(dtype: str, through: str) -> None:
    here = replace(MODEL, dtype=dtype)
    there = replace(MODEL, dtype=through, block_size=5)
    kv = kv_of(64, dtype)
    pool = lay(kv, here, 4)
    between = HostMemory.create(13, there.block_bytes)
    back = HostMemory.create(4, here.block_bytes)
    for source, destination, read, write in ((here, there, pool, between), (there, here, between, back)):
        [share] = shares([source], destination)
        relayout = Relayout(share, write, range(write.num_blocks), 0, 64, threading.Lock())
        relayout.relay({position: read.view(position) for position in range(read.num_blocks)})
    exact = bytes(back.blocks) == bytes(pool.blocks)
    # float16 has more digits than bfloat16: only what is too small or large for it is lost, and here nothing is.
    assert exact == (through in (dtype, "float32") or (dtype, through) == ("bfloat16", "float16"))


@pytest.mark.parametrize(("destination", "most"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_what_is_rounded_is_off_by_half_a_unit_at_most(destination: str, most: float) -> None:
    kv = kv_of(64, "float32")
    source, target = replace(MODEL, block_size=8), replace(MODEL, dtype=destination)
    pool, landed = lay(kv, source, 8), HostMemory.create(4, target.block_bytes)
    [share] = shares([source], target)
    Relayout(share, landed, range(4), 0, 64, threading.Lock()).relay({p: pool.view(p) for p in range(8)})
    for position in range(4):
        values = as_dtype(array(landed, position, target), destination, "float32")
        exact = kv[:, :, :, position * 16 : position * 16 + 16]
        off = np.abs(values - exact)
        assert off.max() > 0
        assert (off <= np.maximum(np.abs(exact) * most, 2.0**-25)).all()


def test_a_value_that_would_become_infinite_is_refused_by_name() -> None:
    kv = kv_of(16, "float32")
    kv[1, 1, 3, 15, 2] = -65520.0
    source, target = MODEL, replace(MODEL, dtype="float16")
    [share] = shares([source], target)
    relayout = Relayout(share, HostMemory.create(1, target.block_bytes), [0], 0, 16, threading.Lock())
    with pytest.raises(VerifyFailed, match=r"block 0 holds float32 values that are infinite in float16; run both"):
        relayout.relay({0: lay(kv, source, 1).view(0)})


def test_shares_are_all_heads_each_once() -> None:
    two = ranks(replace(MODEL, tp_size=2))
    assert [share.heads for share in shares(two, MODEL)] == [range(2), range(2, 4)]
    assert [share.heads for share in shares(two[::-1], MODEL)] == [range(2, 4), range(2)], "in any order"
    eight = ranks(replace(MODEL, tp_size=8))
    assert [len(share.heads) for share in shares(eight, MODEL)] == [1, 0] * 4, "a copy of a head is not taken"
    assert [share.heads for share in shares([MODEL], two[1])] == [range(2, 4)]


def test_heads_that_nobody_offers_are_named() -> None:
    four = ranks(replace(MODEL, tp_size=4))
    with pytest.raises(LayoutMismatch, match="no source holds KV head 1; the destination needs each from 0 to 3"):
        shares([four[0], four[2], four[3]], MODEL)
    with pytest.raises(LayoutMismatch, match="KV head 3"):
        shares(four[:3], MODEL)
    with pytest.raises(LayoutMismatch, match="number of layers is 3 at the source, 2 at the destination"):
        shares([replace(MODEL, num_layers=3)], MODEL)
