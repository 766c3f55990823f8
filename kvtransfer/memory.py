"""The bytes of a KV pool, as transports see them: numbered blocks of one size, each with a generation.

Owns the layout of the shared memory of a CPU pool. It knows nothing of what is in a block, and never decides which
block is whose. Generations are written by the engine's block pool, on allocation and before anything is written into
the block; all else here only reads them.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import secrets
import stat
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from baton.errors import InternalError, TransferRefused
from kvtransfer.checksum import ChecksumKind, xxh3_checksum

log = logging.getLogger(__name__)

PAGE = 4096
NONCE_BYTES = 16
_MAGIC = b"BATONKV\0"
_VERSION = 1
_HEADER = struct.Struct("<8sI4x16sQQ")  # magic, version, nonce, num_blocks, block_bytes
_NONCE_OFFSET = 16
GENERATION_BYTES = 8
_NAME = "baton-kv"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # whoever maps it can never get a SIGBUS
MAX_BLOCKS = 1 << 32
MAX_BLOCK_BYTES = 1 << 32
_MADV_POPULATE_WRITE = 23  # since Linux 5.14; not in Python's mmap
_POPULATE_BYTES = 4 << 20


class PoolShape(NamedTuple):
    """Where things lie in a pool's shared memory, in bytes from its start: for those who reach it from elsewhere."""

    num_blocks: int
    block_bytes: int

    @property
    def nonce(self) -> int:
        """NONCE_BYTES of them, which no other pool has."""
        return _NONCE_OFFSET

    @property
    def bytes(self) -> int:
        return self.block(0) + _pages(self.num_blocks * self.block_bytes)

    def generation(self, index: int) -> int:
        """GENERATION_BYTES of them, an unsigned number, little-endian."""
        return PAGE + GENERATION_BYTES * index

    def block(self, index: int) -> int:
        return PAGE + _pages(GENERATION_BYTES * self.num_blocks) + index * self.block_bytes

    def check(self, whose: str) -> None:
        """Raises TransferRefused where no pool can be so."""
        if not (0 < self.num_blocks <= MAX_BLOCKS and 0 < self.block_bytes <= MAX_BLOCK_BYTES):
            raise TransferRefused(f"{whose} says that it has {self.num_blocks} blocks of {self.block_bytes} bytes")


class PoolMemory(Protocol):
    """A pool's bytes. Methods may be called from any thread; they check bounds and never wait for the network.

    On a CPU this is `HostMemory`. A pool in device memory brings its own, which copies through host memory and sums
    on the device.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def generation(self, index: int) -> int:
        """Which allocation of the block is the present one."""

    def view(self, index: int, count: int = 1) -> memoryview | None:
        """The bytes of `count` neighbouring blocks, writable and not copied; None where the host can't reach them."""

    def read(self, index: int, count: int = 1) -> memoryview:
        """Their bytes, copied where there is no view."""

    def write(self, index: int, data: memoryview) -> None:
        """Fills the neighbouring blocks from `index` on; `data` holds one or more whole blocks."""

    @property
    def checksum_kind(self) -> ChecksumKind:
        """Of the checksums by which its blocks are compared."""

    def checksums(self, indices: Sequence[int]) -> list[int]:
        """Of the blocks at `indices`, in their order, by the memory's own kind. Reads all of their bytes, where they
        are: for threads, inside a gate."""


class HostMemory:
    """A pool in anonymous shared memory: `[header, a page][generations, uint64, whole pages][blocks]`.

    It has no name in any file system: the kernel frees it with the last process that maps it, whatever ended that.
    """

    def __init__(self, fd: int, mapping: mmap.mmap, nonce: bytes, num_blocks: int, block_bytes: int) -> None:
        """For `create` and `attach` alone."""
        self._fd = fd
        self._mapping = mapping
        self.nonce = nonce
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self.shape = PoolShape(num_blocks, block_bytes)
        start = self.shape.block(0)
        whole = memoryview(mapping)
        self.generations = whole[PAGE : PAGE + GENERATION_BYTES * num_blocks].cast("Q")
        """One unsigned 64-bit number a block."""
        self.blocks = whole[start : start + num_blocks * block_bytes]
        """All blocks' bytes, one behind the other; writable only in the process that created them."""

    @classmethod
    def create(cls, num_blocks: int, block_bytes: int) -> HostMemory:
        """Zeroed memory of this process's own. Pages are taken as they are first touched, or by `populate`. Raises
        OSError where there is not enough address space."""
        if not (0 < num_blocks <= MAX_BLOCKS and 0 < block_bytes <= MAX_BLOCK_BYTES):
            raise InternalError(f"a pool of {num_blocks} blocks of {block_bytes} bytes can't be made")
        size = PoolShape(num_blocks, block_bytes).bytes
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        nonce = secrets.token_bytes(NONCE_BYTES)
        _HEADER.pack_into(mapping, 0, _MAGIC, _VERSION, nonce, num_blocks, block_bytes)
        return cls(fd, mapping, nonce, num_blocks, block_bytes)

    @classmethod
    def attach(cls, pid: int, fd: int, nonce: bytes) -> HostMemory:
        """Another process's, for reading. Raises TransferRefused unless it is the very memory that `nonce` names: a
        process id can be another's by now, or another host's."""
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                raise TransferRefused(f"{path} is not a Baton pool")
            own = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransferRefused(f"{path} can't be opened: {error.strerror}") from None
        try:
            return cls._map(own, path, nonce)
        finally:
            os.close(own)  # the mapping keeps the memory

    @classmethod
    def _map(cls, fd: int, path: str, nonce: bytes) -> HostMemory:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise TransferRefused(f"{path} is not sealed against changes of its size")
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise TransferRefused(f"{path} is too short for a Baton pool: {status.st_size} bytes")
        magic, version, its_nonce, num_blocks, block_bytes = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION:
            raise TransferRefused(f"{path} is not a Baton pool of version {_VERSION}")
        if its_nonce != nonce:
            raise TransferRefused(f"{path} is another pool than the one that was offered")
        shape = PoolShape(num_blocks, block_bytes)
        shape.check(path)
        if status.st_size != shape.bytes:
            raise TransferRefused(f"{path} has {status.st_size} bytes; {num_blocks} blocks take {shape.bytes}")
        mapping = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)
        return cls(-1, mapping, nonce, num_blocks, block_bytes)

    def populate(self) -> threading.Thread:
        """Takes the pages now, the first blocks first, in a thread of its own, which is returned. A page costs a good
        two microseconds where it is first touched, several times what it takes to write it: the first prompts and
        landings would pay for that."""
        thread = threading.Thread(target=self._populate, name="baton-populate", daemon=True)
        thread.start()
        return thread

    def _populate(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        address, size = self.address, len(self._mapping)
        for start in range(0, size, _POPULATE_BYTES):
            if madvise(address + start, min(_POPULATE_BYTES, size - start), _MADV_POPULATE_WRITE):
                log.debug("pages are taken as they are touched: %s", os.strerror(ctypes.get_errno()))
                return

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    @property
    def address(self) -> int:
        """Where it is mapped in this process, which must be the one that created it."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def block_address(self, index: int) -> int:
        return self.address + self.shape.block(self._checked(index, 1))

    @property
    def fd(self) -> int:
        """The descriptor by which another process of this host can attach; -1 where none can."""
        return self._fd

    def generation(self, index: int) -> int:
        return self.generations[self._checked(index, 1)]

    def view(self, index: int, count: int = 1) -> memoryview:
        start = self._checked(index, count) * self._block_bytes
        return self.blocks[start : start + count * self._block_bytes]

    def read(self, index: int, count: int = 1) -> memoryview:
        return self.view(index, count)

    def write(self, index: int, data: memoryview) -> None:
        count, rest = divmod(len(data), self._block_bytes)
        if rest or not count:
            raise InternalError(f"{len(data)} bytes are not whole blocks of {self._block_bytes}")
        self.view(index, count)[:] = data

    @property
    def checksum_kind(self) -> ChecksumKind:
        return ChecksumKind.XXH3

    def checksums(self, indices: Sequence[int]) -> list[int]:
        return [xxh3_checksum(self.view(index)) for index in indices]

    def close(self) -> None:
        """Lets no new process attach. The memory itself stays mapped until the last view or tensor of it is gone:
        to unmap it under a tensor would be a segmentation fault."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _checked(self, index: int, count: int) -> int:
        if index < 0 or count < 1 or index + count > self._num_blocks:
            raise InternalError(f"blocks [{index}, {index + count}) are not in a pool of {self._num_blocks}")
        return index


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
