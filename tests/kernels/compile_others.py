"""Compiles for GPUs that are not here what element-wise work, sampling and the moving of blocks launch, and tells what
the machine code takes. For a process of its own, in which Triton does not interpret:
`python -m tests.kernels.compile_others 90`, the number being the compute capability."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.gpu.blocks import gather_blocks, scatter_blocks
from engine.kernels.gpu.counting import count_tokens
from engine.kernels.gpu.elementwise import TritonElementWise
from engine.kernels.gpu.passes import Pass
from engine.kernels.gpu.sampling import sample_on_device
from engine.kernels.gpu.sampling_table import SamplingTensors

DTYPE = torch.bfloat16
HIDDEN_SIZES, INTERMEDIATE_SIZE = (896, 4096, 16_384), 14_336
VOCAB_SIZES = (1000, 262_144)
BLOCK_BYTES = 2 << 20

_DIVISOR = 16  # a pointer or an integer that it divides is compiled for apart
_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def passes() -> list[Pass]:
    """Every different launch of the public functions, over tensors of zeros that nobody reads."""
    found: list[Pass] = []
    with mock.patch.object(Pass, "run", lambda step: found.append(step)):
        _launch_all()
    unique = {}
    for step in found:
        _, signature, constants, attributes = _specialised(step)
        unique[str((step.kernel.__name__, signature, constants, attributes, step.num_warps))] = step
    return list(unique.values())


def _launch_all() -> None:
    for size in HIDDEN_SIZES:
        rows = torch.zeros(2, size, dtype=DTYPE)
        step = TritonElementWise(1e-6).step(rows)
        step.add_norm(None, rows[0])
        step.add_norm(rows, rows[0])
    step.gate(torch.zeros(2, 2 * INTERMEDIATE_SIZE, dtype=DTYPE))
    out = torch.zeros(2, dtype=torch.int64)
    for vocab_size in VOCAB_SIZES:
        logits, counts = torch.zeros(2, vocab_size, dtype=DTYPE), torch.zeros(2, vocab_size, dtype=torch.int32)
        params = SamplingTensors.neutral(2, "cpu", 8, counts if vocab_size == max(VOCAB_SIZES) else None)
        sample_on_device(logits, params, out)
        count_tokens(params, out)
    indices, blocks = torch.zeros(2, dtype=torch.int32), torch.zeros(2, BLOCK_BYTES, dtype=torch.uint8)
    gather_blocks(blocks, indices, blocks, out)
    scatter_blocks(blocks, indices, blocks, out)


def resources(step: Pass, arch: int) -> dict[str, int | str]:
    compiled = triton.compile(
        ASTSource(*_specialised(step)), target=GPUTarget("cuda", arch, 32), options={"num_warps": step.num_warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(said)
    assert found, f"cuobjdump says nothing of registers: {said}"
    registers, stack, local = map(int, found.groups())
    return {
        "kernel": step.kernel.__name__,
        "warps": step.num_warps,
        "arch": arch,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
    }


def _specialised(step: Pass) -> tuple[Any, dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """The kernel, and what Triton makes of the arguments: types, constants, and what 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(step.kernel.params):
        argument = step.arguments[parameter.name]
        is_one = type(argument) is int and argument == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            signature[parameter.name], constants[(index,)] = "constexpr", argument
            continue
        signature[parameter.name] = _type(argument)
        aligned = argument.data_ptr() if isinstance(argument, Tensor) else argument
        if isinstance(aligned, int) and aligned % _DIVISOR == 0 and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", _DIVISOR]]
    return step.kernel, signature, constants, attributes


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return "*" + _TYPES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def all_resources(archs: list[int]) -> Iterator[dict[str, int | str]]:
    for step in passes():
        for arch in archs:
            yield resources(step, arch)


if __name__ == "__main__":
    for found in all_resources([int(arch) for arch in sys.argv[1:]]):
        print(json.dumps(found), flush=True)
