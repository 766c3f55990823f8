"""Compiles launches for GPUs that are not here, and tells what the machine code takes: a kernel whose registers
overflow into local memory, or whose tiles do not fit a multiprocessor, is seen without the device.

Needs Triton's compiler, so no TRITON_INTERPRET in the environment; it changes what a kernel is when it is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.gpu.launch import Launch

_WARP = 32
_DIVISOR = 16  # a pointer or an integer that it divides is compiled for apart
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_MEMORY = re.compile(r"\b(?:ld\.global|st\.global|atom\.global|red\.global|cp\.async)[.\w]*")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel's machine code."""

    kernel: str
    arch: int
    """Compute capability, such as 90."""
    warps: int
    registers: int
    """A thread's."""
    stack: int
    """Bytes of a thread in local memory, as are those of `local`: spilled registers among them."""
    local: int
    shared: int
    """Bytes of a program."""
    early: str
    """What it does in memory that others see before its turn comes, or without one, and must not (overlap.py)."""


def resources(launch: Launch, arch: int) -> Resources:
    """Of `launch` as compute capability `arch` would run it; of its tensors nothing but type and address counts."""
    source = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    compiled = triton.compile(
        source(*signature_of(launch, arch)), target=GPUTarget("cuda", arch, _WARP), options=launch.options(arch)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(said)
    assert found, f"cuobjdump says nothing of registers: {said}"
    registers, stack, local = (int(number) for number in found.groups())
    shared = compiled.metadata.shared
    early = _before_its_turn(compiled.asm["ptx"]) if "launch_pdl" in launch.options(arch) else ""
    return Resources(launch.kernel.__name__, arch, launch.num_warps, registers, stack, local, shared, early)


def _before_its_turn(ptx: str) -> str:
    return " ".join(sorted(set(_MEMORY.findall(ptx.partition("griddepcontrol.wait")[0]))))


def signature_of(
    launch: Launch, arch: int
) -> tuple[Any, dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """The kernel, and what Triton would make of the arguments: types, constants, and what 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    arguments = launch.complete(arch)
    for index, parameter in enumerate(launch.kernel.params):
        argument = arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or argument is None or (free and type(argument) is int and argument == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = argument
            continue
        signature[parameter.name] = _type(argument)
        aligned = argument.data_ptr() if isinstance(argument, Tensor) else argument
        if free and isinstance(aligned, int) and aligned % _DIVISOR == 0:
            attributes[(index,)] = [["tt.divisibility", _DIVISOR]]
    return launch.kernel, signature, constants, attributes


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _POINTERS[argument.dtype]
    if isinstance(argument, TensorDescriptor):
        element = _POINTERS[argument.base.dtype].removeprefix("*")
        return f"tensordesc<{element}{argument.block_shape},{argument.layout!r}>"
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"
