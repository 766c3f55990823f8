"""A source with its pool in device memory, in a process of its own: `python -m tests.worker.device_process` says on
stdout where it is, in hex, and ends with its stdin. A line of stdin gives the block of that number to another use."""

from __future__ import annotations

import sys

import torch

from baton.layout import KVLayout
from engine.kv_cache import KVCache
from kvtransfer.transports.cuda_ipc import cuda_ipc_endpoint
from worker.device_memory import DeviceMemory, share_generations

LAYOUT = KVLayout(4, 2, 16, 64, "bfloat16", b"m" * 16)  # 32 KiB a block
NUM_BLOCKS, GENERATION = 2048, 5


def block(index: int, layout: KVLayout = LAYOUT) -> torch.Tensor:
    """Its bytes, on the CPU."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (layout.block_bytes,), dtype=torch.uint8, generator=generator)


def make_memory(num_blocks: int = NUM_BLOCKS, layout: KVLayout = LAYOUT) -> DeviceMemory:
    return DeviceMemory(KVCache(layout, num_blocks, "cuda"), share_generations(num_blocks))


def main() -> None:
    memory = make_memory()
    for index in range(64):
        memory.write(index, memoryview(block(index).numpy()))  # type: ignore[arg-type]
        memory.shared_generations.generations[index] = GENERATION
    endpoint = cuda_ipc_endpoint(memory)
    assert endpoint is not None, "this device gives its memory to no other process"
    print(endpoint.address.hex(), flush=True)
    for line in sys.stdin:
        memory.shared_generations.generations[int(line)] += 1
        print("done", flush=True)


if __name__ == "__main__":
    main()
