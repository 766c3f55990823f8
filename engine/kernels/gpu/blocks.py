"""Whole KV blocks between the pool and a staging buffer, and their checksums in the same pass over memory.

The staging buffer is in device memory, or in pinned host memory, which the device reaches under the same address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import block_checksum
from engine.kernels.gpu.launch import Launch

# Launch parameters. TILE: pairs at a time; PART: pairs of a program; what is copied and summed does not depend on them.
TILE, PART, COPY_WARPS = 1024, 8192, 4

_FIRST, _WEYL = tl.constexpr(block_checksum.FIRST), tl.constexpr(block_checksum.WEYL)
_KEY_MULTIPLIER = tl.constexpr(block_checksum.KEY_MULTIPLIER)
_LENGTH_MULTIPLIER = tl.constexpr(block_checksum.LENGTH_MULTIPLIER)
_FINAL_0, _FINAL_1 = (tl.constexpr(multiplier) for multiplier in block_checksum.FINAL_MULTIPLIERS)
_PAIR_BYTES = tl.constexpr(block_checksum.PAIR_BYTES)


def gather_blocks(pool_bytes: Tensor, indices: Tensor, out: Tensor, checksums: Tensor) -> None:
    """Copies blocks `indices` `[n]` (int32 or int64, on the device) of `pool_bytes` `[num_blocks, block_bytes]` uint8
    to `out` `[n, block_bytes]` uint8, and their checksums (`block_checksum_reference`, its bits as int64) to
    `checksums` `[n]` int64.

    Raises ValueError where `block_bytes` is no multiple of 8. Waits for nothing, and can be captured in a CUDA graph.
    """
    for step in _passes(pool_bytes, out, indices, checksums, gathers=True):
        step.run()


def scatter_blocks(data: Tensor, indices: Tensor, pool_bytes: Tensor, checksums: Tensor) -> None:
    """The other way: `data` `[n, block_bytes]` to blocks `indices`, no two of them the same, of `pool_bytes`; and what
    checksums the data had."""
    for step in _passes(data, pool_bytes, indices, checksums, gathers=False):
        step.run()


def _passes(source: Tensor, target: Tensor, indices: Tensor, checksums: Tensor, *, gathers: bool) -> list[Launch]:
    block_bytes, count = source.shape[1], len(indices)
    if block_bytes % block_checksum.PAIR_BYTES:
        raise ValueError(f"blocks of {block_bytes} bytes: it must be a multiple of {block_checksum.PAIR_BYTES}")
    staged = target if gathers else source
    assert target.shape[1] == block_bytes, f"blocks of {block_bytes} and of {target.shape[1]} bytes"
    assert len(staged) == count == len(checksums), f"{count} indices, {len(staged)} staged, {len(checksums)} checksums"
    assert source.is_contiguous(), "blocks of the source lie apart"
    assert target.is_contiguous(), "blocks of the target lie apart"
    assert checksums.dtype is torch.int64, f"checksums of {checksums.dtype}"
    num_pairs = block_bytes // block_checksum.PAIR_BYTES
    num_parts = triton.cdiv(num_pairs, PART)
    sums = torch.empty((count, num_parts), dtype=torch.int64, device=indices.device)
    copying = {
        "source": source.view(torch.int64),
        "target": target.view(torch.int64),
        "indices": indices,
        "sums": sums,
        "num_pairs": num_pairs,
        "GATHERS": gathers,
        "TILE": TILE,
        "PART": PART,
    }
    finishing = {"sums": sums, "checksums": checksums, "num_parts": num_parts, "num_pairs": num_pairs}
    return [
        Launch(copy_and_sum, (count, num_parts), copying, COPY_WARPS),
        Launch(finish_sums, (count,), {**finishing, "PARTS": triton.next_power_of_2(num_parts)}, 1),
    ]


@triton.jit
def copy_and_sum(
    source: tl.tensor,
    target: tl.tensor,
    indices: tl.tensor,
    sums: tl.tensor,
    num_pairs: tl.tensor,
    GATHERS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """A program: PART pairs of one block."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.load(indices + row).to(tl.int64)
    if GATHERS:
        source += block * num_pairs
        target += row * num_pairs
    else:
        source += row * num_pairs
        target += block * num_pairs
    added = tl.zeros([TILE], tl.uint64)
    for start in range(part * PART, tl.minimum((part + 1) * PART, num_pairs), TILE):
        pairs = start + tl.arange(0, TILE)
        is_pair = pairs < num_pairs
        words = tl.load(source + pairs, mask=is_pair, other=0)
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
