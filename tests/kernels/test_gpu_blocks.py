"""Blocks moved by the GPU's kernels, and their checksums beside the reference in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.layout import KVLayout
from engine.kernels.choice import block_kernels
from engine.kernels.gpu import blocks
from engine.kernels.gpu.blocks import copy_blocks, gather_blocks, launch_all, scatter_blocks, sum_blocks
from engine.kv_cache import KVCache
from kvtransfer.nh import keys, nh_checksum

SIZES = [8, 24, 4096, 8 * blocks.TILE, 8 * blocks.TILE + 8, 8 * blocks.PART, 8 * (5 * blocks.PART + 77), 1 << 18]


def random_blocks(device: torch.device, count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=generator).to(device)


def checksums_of(rows: Tensor) -> list[int]:
    return [nh_checksum(row.numpy().tobytes()) for row in rows.cpu()]


def unsigned(checksums: Tensor) -> list[int]:
    return [checksum % 2**64 for checksum in checksums.tolist()]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_blocks_are_gathered_with_the_references_checksums(
    device: torch.device, size: int, index_dtype: torch.dtype
) -> None:
    pool = random_blocks(device, 5, size)
    before, indices = pool.clone(), torch.tensor([4, 0, 4], dtype=index_dtype, device=device)
    out, checksums = torch.zeros_like(pool[:3]), torch.zeros(3, dtype=torch.int64, device=device)
    gather_blocks(pool, indices, out, checksums)
    assert torch.equal(out, before[indices.long()])
    assert torch.equal(pool, before)
    assert unsigned(checksums) == checksums_of(out)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_scattered_and_no_other_is_touched(device: torch.device, size: int) -> None:
    pool, data = random_blocks(device, 5, size), random_blocks(device, 2, size, seed=1)
    expected, indices = pool.clone(), torch.tensor([3, 1], dtype=torch.int32, device=device)
    expected[[3, 1]] = data
    checksums = torch.zeros(2, dtype=torch.int64, device=device)
    scatter_blocks(data, indices, pool, checksums)
    assert torch.equal(pool, expected)
    assert unsigned(checksums) == checksums_of(data)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_go_from_pool_to_pool_with_the_references_checksums(device: torch.device, size: int) -> None:
    source, target = random_blocks(device, 5, size), random_blocks(device, 4, size, seed=1)
    before, expected = source.clone(), target.clone()
    expected[[2, 0, 3]] = source[[4, 0, 4]]
    sources, targets = (torch.tensor(places, device=device) for places in ([4, 0, 4], [2, 0, 3]))
    checksums = torch.zeros(3, dtype=torch.int64, device=device)
    copy_blocks(source, sources, target, targets, checksums)
    assert torch.equal(target, expected)
    assert torch.equal(source, before)
    assert unsigned(checksums) == checksums_of(target[targets])


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_summed_where_they_are(device: torch.device, size: int) -> None:
    pool = random_blocks(device, 5, size)
    before, indices = pool.clone(), torch.tensor([3, 3, 0, 4], device=device)
    checksums = torch.zeros(4, dtype=torch.int64, device=device)
    sum_blocks(pool, indices, checksums)
    assert torch.equal(pool, before)
    assert unsigned(checksums) == checksums_of(pool[indices])


def test_what_is_launched_to_be_compiled_leaves_the_pool_as_it_is(device: torch.device) -> None:
    pool = random_blocks(device, 2, 4096)
    before = pool.clone()
    launch_all(pool)
    assert torch.equal(pool, before)


def test_no_blocks_are_no_work(device: torch.device) -> None:
    pool, none = random_blocks(device, 2, 64), torch.empty(0, dtype=torch.int64, device=device)
    gather_blocks(pool, none, pool[:0], none)
    scatter_blocks(pool[:0], none, pool, none)
    copy_blocks(pool, none, pool, none, none)
    sum_blocks(pool, none, none)


@pytest.mark.parametrize("size", [4, 12, 4097])
def test_other_than_multiples_of_8_bytes_are_refused_by_both(device: torch.device, size: int) -> None:
    pool, one = random_blocks(device, 2, size), torch.zeros(1, dtype=torch.int64, device=device)
    for refused in (gather_blocks, lambda pool, *rest: scatter_blocks(*reversed(rest[:2]), pool, rest[2])):
        with pytest.raises(ValueError, match=f"{size} bytes: .* multiples? of 8"):
            refused(pool, one, pool[:1].clone(), one)
    with pytest.raises(ValueError, match=f"{size} bytes: .* multiples of 8 bytes"):
        nh_checksum(bytes(size))


def test_the_definition_stays_what_it_is() -> None:
    """Both ends of a transfer have to agree on it."""
    assert keys(3).tolist() == [735127541, 957956239, 3956299635]
    known = {b"": 0, bytes(8): 7723668047449714963, bytes(range(16)): 8957585569097922265}
    assert {data: nh_checksum(data) for data in known} == known


def test_the_definition_is_what_its_docstring_says() -> None:
    """Word by word, in whole numbers."""
    data = np.random.default_rng(0).integers(0, 256, 120, dtype=np.uint8).tobytes()

    def key(j: int) -> int:
        x = (0xBB67AE85 + 0x9E3779B9 * j) % 2**32
        y = 0x85EBCA6B * (x ^ x >> 16) % 2**32
        return y ^ y >> 13

    keyed = [(int.from_bytes(data[4 * j : 4 * j + 4], "little") + key(j)) % 2**32 for j in range(30)]
    h = sum(keyed[i] * keyed[i + 1] for i in range(0, 30, 2)) % 2**64 ^ 0x9E3779B97F4A7C15 * 120 % 2**64
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ h >> 33) * multiplier % 2**64
    assert nh_checksum(data) == h ^ h >> 33


def test_no_two_of_a_blocks_single_bits_flipped_are_alike() -> None:
    for data in (bytes(512), b"\xff" * 512, random_blocks(torch.device("cpu"), 1, 512).numpy().tobytes()):
        seen = {nh_checksum(data)}
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            seen.add(nh_checksum(flipped))
        assert len(seen) == 8 * len(data) + 1


@pytest.mark.parametrize("word_bytes", [1, 2, 4, 8, 64])
def test_swapped_words_are_seen(word_bytes: int) -> None:
    words = random_blocks(torch.device("cpu"), 1, 2048)[0].numpy().reshape(-1, word_bytes)
    original, swaps = nh_checksum(words.tobytes()), 0
    for one in range(0, len(words), max(1, len(words) // 20)):
        for other in range(one + 1, len(words), max(1, len(words) // 25)):
            swapped = words.copy()
            swapped[[one, other]] = words[[other, one]]
            if not np.array_equal(swapped, words):
                swaps += 1
                assert nh_checksum(swapped.tobytes()) != original
    assert swaps > 100


def test_zeros_of_different_lengths_differ_as_do_shifted_blocks() -> None:
    assert len({nh_checksum(bytes(size)) for size in range(0, 8192, 8)}) == 1024
    data = random_blocks(torch.device("cpu"), 1, 4096)[0].numpy()
    assert len({nh_checksum(np.roll(data, shift).tobytes()) for shift in range(4096)}) == 4096


def test_bits_of_the_checksum_are_evenly_used() -> None:
    checksums = checksums_of(random_blocks(torch.device("cpu"), 2000, 64))
    ones = [sum(checksum >> bit & 1 for checksum in checksums) for bit in range(64)]
    assert 850 < min(ones) <= max(ones) < 1150  # 6.7 standard deviations


@pytest.mark.gpu
def test_a_pool_of_other_than_multiples_of_8_bytes_goes_without_kernels() -> None:
    assert block_kernels(KVCache(KVLayout(1, 1, 1, 2, "bfloat16", b"m"), 2, "cuda")) is not None
    assert block_kernels(KVCache(KVLayout(1, 1, 1, 1, "bfloat16", b"m"), 2, "cuda")) is None


@pytest.mark.gpu
def test_the_staging_buffer_can_be_pinned_host_memory() -> None:
    device = torch.device("cuda")
    pool, indices = random_blocks(device, 8, 1 << 20), torch.tensor([6, 1, 3], device=device)
    staged = torch.zeros(3, 1 << 20, dtype=torch.uint8, pin_memory=True)
    checksums = torch.zeros(3, dtype=torch.int64, device=device)
    gather_blocks(pool, indices, staged, checksums)
    torch.cuda.synchronize()
    assert torch.equal(staged, pool.cpu()[[6, 1, 3]])
    again, landed = torch.zeros_like(checksums), torch.zeros_like(pool)
    scatter_blocks(staged, indices, landed, again)
    assert torch.equal(landed[indices], pool[indices])
    assert torch.equal(again, checksums)
