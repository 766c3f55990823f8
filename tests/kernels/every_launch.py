"""Every launch that our Triton kernels have, compiled for GPUs that are not here, and what the machine code takes: a
JSON object a launch. For a process of its own, in which Triton does not interpret:

    python -m tests.kernels.every_launch 90 default

the compute capability, and the device whose configurations are compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine.attention import HeadNorms, Rotary
from engine.kernels.gpu import tuning
from engine.kernels.gpu.aot import resources, signature_of
from engine.kernels.gpu.attention_decode import DecodeScratch, attention_decode
from engine.kernels.gpu.attention_prefill import SpanTensors, attention_prefill
from engine.kernels.gpu.attention_prefill_hopper import attention_prefill_hopper
from engine.kernels.gpu.blocks import copy_blocks, gather_blocks, scatter_blocks, sum_blocks
from engine.kernels.gpu.counting import count_tokens
from engine.kernels.gpu.elementwise import TritonElementWise
from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.linear import TritonLinear
from engine.kernels.gpu.rotary_write import rotary_write, write
from engine.kernels.gpu.sampling import sample_on_device
from engine.kernels.gpu.sampling_table import SamplingTensors

DTYPE = torch.bfloat16
HEAD_DIMS = (64, 128, 256)
HIDDEN_SIZES, INTERMEDIATE_SIZE = (896, 4096, 16_384), 14_336
LINEARS = ((4096, 4096), (28_672, 4096), (900, 4864))
VOCAB_SIZES = (1000, 262_144)
BLOCK_BYTES = 2 << 20


def of_attention(head_dim: int, dtype: torch.dtype, device_name: str, group: int = 7) -> Iterator[Launch]:
    """Every kernel of attention as a model with 2 key heads launches it, over nothing but zeros. `group`: query heads
    to a key head; 7, by which rows are not so easily divided, wants the most registers of prefill."""
    num_heads, num_kv_heads, num_tokens = 2 * group, 2, 16

    def configured(kernel: str) -> tuning.LaunchConfig:
        return tuning.config(kernel, device_name, head_dim).for_element(dtype.itemsize)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    pool = zeros(2, 2, 2, num_kv_heads, 16, head_dim)
    tables = torch.zeros((num_tokens, 16), dtype=torch.int32)
    tokens = torch.zeros(num_tokens, dtype=torch.int32)
    places: dict[str, Any] = {"slots": tokens, "lengths": tokens, "block_tables": tables}
    output = zeros(num_tokens, num_heads * head_dim)
    qkv = zeros(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    heads = qkv.view(num_tokens, -1, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)

    rotary_config = configured("rotary_write")
    angles = torch.zeros(num_tokens, head_dim // 2)
    for norms in (None, HeadNorms(zeros(head_dim), zeros(head_dim), 1e-6)):
        yield rotary_write(
            qkv, pool, 0, rotary=Rotary(angles, angles), norms=norms, query=query, config=rotary_config, **places
        )
    yield write(key, value, pool, 0, config=rotary_config, **places)

    split, reduce = configured("attention_decode"), configured("attention_reduce")
    for num_splits in (1, split.max_splits):
        scratch = DecodeScratch.empty(num_tokens, num_heads, num_splits, head_dim, "cpu")
        yield from attention_decode(
            query, pool, 0, window=None, scratch=scratch, output=output, split=split, reduce=reduce, **places
        )

    spans = SpanTensors(tokens, tokens, tokens, tokens, tokens, tokens)
    prefill = configured("attention_prefill")
    yield attention_prefill(
        query, pool, 0, spans=spans, block_tables=tables, window=None, output=output, config=prefill
    )


def of_hopper(device_name: str, group: int = 7) -> Iterator[tuple[int, Launch]]:
    """By head size, the launches that only compute capability 9 has."""
    tokens, tables = torch.zeros(16, dtype=torch.int32), torch.zeros((16, 16), dtype=torch.int32)
    spans = SpanTensors(tokens, tokens, tokens, tokens, tokens, tokens)
    for head_dim in (64, 128):
        query = torch.zeros((16, 2 * group, head_dim), dtype=DTYPE)
        pool = torch.zeros((2, 2, 2, 2, 16, head_dim), dtype=DTYPE)
        config = tuning.config("attention_prefill_hopper", device_name, head_dim)
        yield (
            head_dim,
            attention_prefill_hopper(
                query, pool, 0, spans=spans, block_tables=tables, window=None, output=query.flatten(1), config=config
            ),
        )


def of_the_others() -> Iterator[Launch]:
    """Every different launch of element-wise work, sampling and the moving of blocks, over zeros that nobody reads."""
    found: list[Launch] = []
    with mock.patch.object(Launch, "run", lambda launch: found.append(launch)):
        _launch_others()
    yield from {f"{signature_of(launch, 80)} {launch.options(80)}": launch for launch in found}.values()


def _launch_others() -> None:
    for size in HIDDEN_SIZES:
        rows = torch.zeros(2, size, dtype=DTYPE)
        step = TritonElementWise(1e-6).step(rows)
        step.add_norm(None, rows[0])
        step.add_norm(rows, rows[0])
    step.gate(torch.zeros(2, 2 * INTERMEDIATE_SIZE, dtype=DTYPE))
    for features, depth in LINEARS:
        linear = TritonLinear(torch.zeros(features, depth, dtype=DTYPE), torch.zeros(features, dtype=DTYPE))
        linear(torch.zeros(2, depth, dtype=DTYPE))
    out = torch.zeros(2, dtype=torch.int64)
    for vocab_size in VOCAB_SIZES:
        logits, counts = torch.zeros(2, vocab_size, dtype=DTYPE), torch.zeros(2, vocab_size, dtype=torch.int32)
        params = SamplingTensors.neutral(2, "cpu", 8, counts if vocab_size == max(VOCAB_SIZES) else None)
        sample_on_device(logits, params, out)
        count_tokens(params, out)
    indices, blocks = torch.zeros(2, dtype=torch.int32), torch.zeros(2, BLOCK_BYTES, dtype=torch.uint8)
    gather_blocks(blocks, indices, blocks, out)
    scatter_blocks(blocks, indices, blocks, out)
    copy_blocks(blocks, out, blocks, out, out)
    sum_blocks(blocks, out, out)


def main() -> None:
    arch, device_name = int(sys.argv[1]), sys.argv[2]
    cases = [(str(size), of_attention(size, DTYPE, device_name)) for size in HEAD_DIMS]
    if device_name == "default":  # the others have no configurations of devices
        cases.append(("", of_the_others()))
    if arch == 90:
        cases += [(str(head_dim), iter([launch])) for head_dim, launch in of_hopper(device_name)]
    for head_dim, launches in cases:
        for launch in launches:
            print(json.dumps({"head_dim": head_dim} | asdict(resources(launch, arch))), flush=True)


if __name__ == "__main__":
    main()
