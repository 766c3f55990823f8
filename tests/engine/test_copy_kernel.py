"""The compiled copier against numpy's copy and the checksum that kvtransfer takes with a library."""

from __future__ import annotations

import mmap
import random

import pytest

from engine.kernels.cpu.copy import BlockCopier
from engine.kernels.cpu.library import Isa, Kernel, load_kernel
from kvtransfer.checksum import copy_blocks, xxh3_checksum
from kvtransfer.memory import HostMemory
from worker.copying import block_copier

KERNEL = load_kernel()
pytestmark = pytest.mark.skipif(KERNEL is None, reason="there is no C compiler")

# Around what the checksum treats by itself: its shortest, stripes of 64 bytes, sixteen of them, and what is left.
SIZES = [241, 255, 256, 257, 320, 1023, 1024, 1025, 1088, 2048, 4096, 4097, 65568, 700_008, 768 << 10]


def kernel(isa: Isa) -> Kernel:
    assert KERNEL is not None
    if isa > KERNEL.isa:
        pytest.skip(f"this machine has no {isa.name}")
    return KERNEL.with_isa(isa)


@pytest.mark.parametrize("isa", [Isa.GENERIC, Isa.AVX2])
@pytest.mark.parametrize("size", SIZES)
def test_blocks_land_and_are_summed_as_the_library_does_it(isa: Isa, size: int) -> None:
    source = memoryview(bytearray(random.Random(size).randbytes(5 * size)))
    target, expected = memoryview(mmap.mmap(-1, 5 * size)), memoryview(bytearray(5 * size))
    pairs = [(0, 3), (3, 0), (1, 1), (4, 2)]
    sums = BlockCopier(kernel(isa))(source, target, size, pairs, summed=True)
    assert sums == copy_blocks(source, expected, size, pairs, summed=True)
    assert sums == [xxh3_checksum(source[s * size : (s + 1) * size]) for s, _ in pairs]
    assert target[: 5 * size] == expected  # and nothing behind the third block
    assert BlockCopier(kernel(isa))(source, target, size, [(4, 4)], summed=False) == []
    assert target[4 * size : 5 * size] == source[4 * size :]


@pytest.mark.parametrize("isa", [Isa.GENERIC, Isa.AVX2])
def test_a_target_that_is_not_on_a_cache_line_is_right_too(isa: Isa) -> None:
    source, target = memoryview(bytearray(range(256)) * 16), memoryview(mmap.mmap(-1, 8192))[8 : 8 + 4096]
    assert BlockCopier(kernel(isa))(source, target, 4096, [(0, 0)], summed=True) == [xxh3_checksum(source)]
    assert target == source


@pytest.mark.parametrize("pair", [(-1, 0), (0, -1), (2, 0), (0, 3)])
def test_places_outside_of_the_pools_are_never_touched(pair: tuple[int, int]) -> None:
    source, target = memoryview(bytearray(2 * 512)), memoryview(bytearray(3 * 512 - 1))
    for outside in (pair, (0, 2)):
        with pytest.raises(AssertionError, match="is not in a pool of 1024 and one of 1535 bytes"):
            BlockCopier(kernel(Isa.GENERIC))(source, target, 512, [(0, 0), outside], summed=True)


def test_what_is_too_short_for_it_goes_another_way_on_a_worker() -> None:
    short, whole = memoryview(bytearray(range(240))), memoryview(bytearray(240))
    copier = BlockCopier(kernel(Isa.GENERIC))
    assert copier.least == 241
    with pytest.raises(AssertionError, match="blocks of 240 bytes; at least 241"):
        copier(short, whole, 240, [(0, 0)], summed=True)
    on_worker = block_copier(HostMemory.create(1, 4096))
    assert on_worker(short, whole, 240, [(0, 0)], summed=True) == [xxh3_checksum(short)]
    assert whole == short
