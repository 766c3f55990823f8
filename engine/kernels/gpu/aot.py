"""Compiles launches for GPUs that are not here, and tells what the machine code takes: a kernel whose registers
overflow into local memory, or whose tiles do not fit a multiprocessor, is seen without the device.

Needs Triton's compiler, so no TRITON_INTERPRET in the environment; it changes what a kernel is when it is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention import HeadNorms, Rotary
from engine.kernels.gpu import tuning
from engine.kernels.gpu.attention_decode import DecodeScratch, attention_decode
from engine.kernels.gpu.attention_prefill import SpanTensors, attention_prefill
from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.rotary_write import rotary_write, write

_WARP = 32
_DIVISOR = 16  # a pointer or an integer that it divides is compiled for apart
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel's machine code."""

    kernel: str
    head_dim: int
    dtype: str
    arch: int
    """Compute capability, such as 90."""
    registers: int
    """A thread's."""
    stack: int
    """Bytes of a thread in local memory, as are those of `local`: spilled registers among them."""
    local: int
    shared: int
    """Bytes of a program."""


def resources(launch: Launch, arch: int, head_dim: int, dtype: torch.dtype) -> Resources:
    """Of `launch` as compute capability `arch` would run it; of its tensors nothing but type and address counts."""
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", arch, _WARP),
        options={"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(said)
    assert found, f"cuobjdump says nothing of registers: {said}"
    registers, stack, local = (int(number) for number in found.groups())
    name = str(dtype).removeprefix("torch.")
    return Resources(launch.kernel.__name__, head_dim, name, arch, registers, stack, local, compiled.metadata.shared)


def launches(head_dim: int, dtype: torch.dtype, device_name: str, group: int = 7) -> Iterator[Launch]:
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


def _source(launch: Launch) -> ASTSource:
    """The kernel's source with what Triton would make of the arguments: constants, types, and what 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        argument = launch.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or argument is None or (free and type(argument) is int and argument == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = argument
            continue
        signature[parameter.name] = _type(argument)
        aligned = argument.data_ptr() if isinstance(argument, Tensor) else argument
        if free and isinstance(aligned, int) and aligned % _DIVISOR == 0:
            attributes[(index,)] = [["tt.divisibility", _DIVISOR]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def main() -> None:
    """One JSON object a kernel: of the head sizes, dtype, capabilities and device that the arguments name, such as
    `64,128 bfloat16 80,90 default`."""
    head_dims, dtype_name, archs, device_name = sys.argv[1:]
    dtype: torch.dtype = getattr(torch, dtype_name)
    for head_dim in head_dims.split(","):
        for arch in archs.split(","):
            for launch in launches(int(head_dim), dtype, device_name):
                print(json.dumps(asdict(resources(launch, int(arch), int(head_dim), dtype))), flush=True)


if __name__ == "__main__":
    main()
