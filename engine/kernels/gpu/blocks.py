"""Whole KV blocks from one pool to another or between a pool and a staging buffer, and their checksums (baton/nh.py) in
the same pass over memory; or the checksums alone.

The staging buffer is in device memory, or in pinned host memory, which the device reaches under the same address.
Checksums are the bits of an unsigned number, as int64. Nothing here waits, and all can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton import nh
from engine.kernels.gpu.launch import Launch

# Launch parameters. TILE: pairs at a time; PART: pairs of a program; what is copied and summed does not depend on them.
TILE, PART, COPY_WARPS = 1024, 8192, 4

_FIRST, _WEYL = tl.constexpr(nh.FIRST), tl.constexpr(nh.WEYL)
_KEY_MULTIPLIER = tl.constexpr(nh.KEY_MULTIPLIER)
_LENGTH_MULTIPLIER = tl.constexpr(nh.LENGTH_MULTIPLIER)
_FINAL_0, _FINAL_1 = (tl.constexpr(multiplier) for multiplier in nh.FINAL_MULTIPLIERS)
_PAIR_BYTES = tl.constexpr(nh.PAIR_BYTES)


def gather_blocks(pool_bytes: Tensor, indices: Tensor, out: Tensor, checksums: Tensor) -> None:
    """Copies blocks `indices` `[n]` (int32 or int64, on the device) of `pool_bytes` `[num_blocks, block_bytes]` uint8
    to `out` `[n, block_bytes]` uint8, and their checksums to `checksums` `[n]` int64.

    Raises ValueError where `block_bytes` is no multiple of 8, as all of these do.
    """
    _run(pool_bytes, indices, out, None, checksums)


def scatter_blocks(data: Tensor, indices: Tensor, pool_bytes: Tensor, checksums: Tensor) -> None:
    """The other way: `data` `[n, block_bytes]` to blocks `indices`, no two of them the same, of `pool_bytes`; and what
    checksums the data had."""
    _run(data, None, pool_bytes, indices, checksums)


def copy_blocks(source: Tensor, sources: Tensor, target: Tensor, targets: Tensor, checksums: Tensor) -> None:
    """Blocks `sources` of one pool to blocks `targets`, no two of them the same, of another; and what checksums they
    had as they were read."""
    _run(source, sources, target, targets, checksums)


def sum_blocks(pool_bytes: Tensor, indices: Tensor, checksums: Tensor) -> None:
    """The checksums of blocks `indices` alone."""
    _run(pool_bytes, indices, None, None, checksums)


def launch_all(pool_bytes: Tensor) -> None:
    """Launches what a pool's transfers do, so that it is compiled before they do. Leaves the pool as it is."""
    first, checksums = (torch.zeros(1, dtype=torch.int64, device=pool_bytes.device) for _ in range(2))
    sum_blocks(pool_bytes, first, checksums)
    copy_blocks(pool_bytes, first, pool_bytes, first, checksums)


def _run(
    source: Tensor, sources: Tensor | None, target: Tensor | None, targets: Tensor | None, checksums: Tensor
) -> None:
    """Without `sources` or `targets` the blocks lie one behind the other there, in the order of the checksums."""
    count, block_bytes = len(checksums), source.shape[1]
    if block_bytes % nh.PAIR_BYTES:
        raise ValueError(f"blocks of {block_bytes} bytes: it must be a multiple of {nh.PAIR_BYTES}")
    _check("source", source, sources, block_bytes, count)
    if target is not None:
        _check("target", target, targets, block_bytes, count)
    assert checksums.dtype is torch.int64, f"checksums of {checksums.dtype}"
    num_pairs = block_bytes // nh.PAIR_BYTES
    num_parts = triton.cdiv(num_pairs, PART)
    sums = torch.empty((count, num_parts), dtype=torch.int64, device=checksums.device)
    copying = {
        "source": source.view(torch.int64),
        "sources": sources,
        "target": None if target is None else target.view(torch.int64),
        "targets": targets,
        "sums": sums,
        "num_pairs": num_pairs,
        "TILE": TILE,
        "PART": PART,
    }
    finishing = {"sums": sums, "checksums": checksums, "num_parts": num_parts, "num_pairs": num_pairs}
    Launch(copy_and_sum, (count, num_parts), copying, COPY_WARPS).run()
    Launch(finish_sums, (count,), {**finishing, "PARTS": triton.next_power_of_2(num_parts)}, 1).run()


def _check(which: str, blocks: Tensor, indices: Tensor | None, block_bytes: int, count: int) -> None:
    given = len(blocks if indices is None else indices)
    assert given == count, f"{given} blocks of the {which} for {count} checksums"
    assert blocks.shape[1] == block_bytes, f"blocks of {block_bytes} and of {blocks.shape[1]} bytes"
    assert blocks.is_contiguous(), f"blocks of the {which} lie apart"


@triton.jit
def copy_and_sum(
    source: tl.tensor,
    sources: tl.tensor | None,
    target: tl.tensor | None,
    targets: tl.tensor | None,
    sums: tl.tensor,
    num_pairs: tl.tensor,
    TILE: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """A program: PART pairs of one block."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sources is None:
        source += row * num_pairs
    else:
        source += tl.load(sources + row).to(tl.int64) * num_pairs
    if target is not None:
        if targets is None:
            target += row * num_pairs
        else:
            target += tl.load(targets + row).to(tl.int64) * num_pairs
    added = tl.zeros([TILE], tl.uint64)
    for start in range(part * PART, tl.minimum((part + 1) * PART, num_pairs), TILE):
        pairs = start + tl.arange(0, TILE)
        is_pair = pairs < num_pairs
        words = tl.load(source + pairs, mask=is_pair, other=0)
        if target is not None:
            tl.store(target + pairs, words, mask=is_pair)
        keyed_0 = tl.add(words.to(tl.uint32), _key(pairs * 2), sanitize_overflow=False)
        keyed_1 = tl.add((words >> 32).to(tl.uint32), _key(pairs * 2 + 1), sanitize_overflow=False)
        added += tl.where(is_pair, keyed_0.to(tl.uint64) * keyed_1.to(tl.uint64), 0)
    tl.store(sums + row * tl.num_programs(1) + part, tl.sum(added, 0).to(tl.int64))


@triton.jit
def _key(index: tl.tensor) -> tl.tensor:
    x = tl.add(tl.mul(index.to(tl.uint32), _WEYL, sanitize_overflow=False), _FIRST, sanitize_overflow=False)
    y = tl.mul(x ^ (x >> 16), _KEY_MULTIPLIER, sanitize_overflow=False)
    return y ^ (y >> 13)


@triton.jit(do_not_specialize=["num_pairs"])
def finish_sums(
    sums: tl.tensor, checksums: tl.tensor, num_parts: tl.tensor, num_pairs: tl.tensor, PARTS: tl.constexpr
) -> None:
    """A program: one block."""
    row, parts = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    of_parts = tl.load(sums + row * num_parts + parts, mask=parts < num_parts, other=0)
    mixed = tl.sum(of_parts, 0).to(tl.uint64) ^ (num_pairs.to(tl.uint64) * _PAIR_BYTES * _LENGTH_MULTIPLIER)
    mixed = (mixed ^ (mixed >> 33)) * _FINAL_0
    mixed = (mixed ^ (mixed >> 33)) * _FINAL_1
    tl.store(checksums + row, (mixed ^ (mixed >> 33)).to(tl.int64))
