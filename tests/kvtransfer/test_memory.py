"""Pools in shared memory: layout, bounds, and what attaching refuses."""

from __future__ import annotations

import os
import tempfile

import pytest

from baton.errors import InternalError, TransferRefused
from kvtransfer.memory import PAGE, HostMemory


def test_another_mapping_sees_blocks_and_generations_and_cannot_write() -> None:
    memory = HostMemory.create(10, 5000)
    attached = HostMemory.attach(os.getpid(), memory.fd, memory.nonce)
    assert (attached.num_blocks, attached.block_bytes) == (10, 5000)
    memory.write(3, memoryview(b"x" * 10000))
    memory.generations[4] = 2**64 - 1
    assert bytes(attached.read(3, 2)) == b"x" * 10000
    assert bytes(attached.read(5)) == bytes(5000)
    assert attached.generation(4) == 2**64 - 1
    assert attached.blocks.readonly
    with pytest.raises(TypeError, match="read-only"):
        attached.write(3, memoryview(b"y" * 5000))


def test_blocks_and_generations_begin_on_pages() -> None:
    memory = HostMemory.create(1000, 4096)
    path = f"/proc/self/fd/{memory.fd}"
    assert os.stat(path).st_size == PAGE + 2 * PAGE + 1000 * 4096
    memory.view(0)[:4] = b"data"
    with open(path, "rb") as file:
        assert file.read()[3 * PAGE :][:4] == b"data"


def test_populating_takes_all_pages_and_changes_none() -> None:
    memory = HostMemory.create(100, 50_000)
    memory.view(99)[-4:] = b"data"
    assert _resident(memory) < 10 * PAGE
    memory.populate().join()
    assert _resident(memory) == os.fstat(memory.fd).st_size
    assert bytes(memory.view(99)[-5:]) == b"\0data"


def _resident(memory: HostMemory) -> int:
    return 512 * os.fstat(memory.fd).st_blocks


def test_its_size_is_sealed_so_that_a_mapping_never_faults() -> None:
    memory = HostMemory.create(2, 4096)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)


def test_views_outlive_close() -> None:
    memory = HostMemory.create(2, 4096)
    view = memory.view(1)
    memory.close()
    memory.close()
    view[:2] = b"ok"
    assert memory.fd == -1
    assert bytes(view[:2]) == b"ok"


@pytest.mark.parametrize(("index", "count"), [(-1, 1), (10, 1), (9, 2), (0, 0), (0, 11)])
def test_blocks_outside_the_pool_are_out_of_bounds(index: int, count: int) -> None:
    with pytest.raises(InternalError, match="not in a pool of 10"):
        HostMemory.create(10, 64).view(index, count)


def test_only_whole_blocks_are_written() -> None:
    with pytest.raises(InternalError, match="65 bytes are not whole blocks of 64"):
        HostMemory.create(10, 64).write(0, memoryview(bytes(65)))


def test_attach_refuses_another_pool_than_the_one_that_was_named() -> None:
    memory = HostMemory.create(2, 64)
    with pytest.raises(TransferRefused, match="another pool"):
        HostMemory.attach(os.getpid(), memory.fd, bytes(16))


def test_attach_refuses_what_is_no_pool() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(TransferRefused, match="not a Baton pool"):
        HostMemory.attach(os.getpid(), file.fileno(), bytes(16))
    fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with pytest.raises(TransferRefused, match="not sealed"):
            HostMemory.attach(os.getpid(), fd, bytes(16))
    finally:
        os.close(fd)


def test_attach_refuses_a_header_that_lies_about_the_size() -> None:
    memory = HostMemory.create(4, 4096)
    os.pwrite(memory.fd, (1 << 31).to_bytes(8, "little"), 8 + 4 + 4 + 16)  # num_blocks
    with pytest.raises(TransferRefused, match="bytes; 2147483648 blocks take"):
        HostMemory.attach(os.getpid(), memory.fd, memory.nonce)


def test_attach_refuses_a_process_that_is_not_there() -> None:
    with pytest.raises(TransferRefused, match="can't be opened"):
        HostMemory.attach(2**22 + 1, 3, bytes(16))
