"""A step launches the same few kernels for every layer, and what Triton finds out about their arguments each time takes
the host longer than many of them run. So a launch that is like one of the kernel's last goes to the driver as it is.

Alike is what Triton has the same code for: numbers are the same, except those that the kernel does not specialize for;
tensors have the same dtype, and addresses that 16 divides. Where that is not so, the launch goes the long way.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from engine.kernels.gpu.launch import Arguments, Launch

_ALIGNMENT = 16
_LEAST, _MOST = -(1 << 31), (1 << 31) - 1


class Again:
    """How a kernel was launched."""

    def __init__(self, launch: Launch, told: Arguments, compiled: Any) -> None:
        """`told`: what the kernel was told besides the launch's arguments. `compiled`: what it was compiled to."""
        arguments = {**launch.arguments, **told}
        self._told, self._compiled = told, compiled
        self._setting = _setting(launch)
        self._all = itemgetter(*launch.kernel.arg_names)
        self._tensors = {name: value.dtype for name, value in arguments.items() if isinstance(value, Tensor)}
        self._descriptors = {n: _shape(value) for n, value in arguments.items() if isinstance(value, TensorDescriptor)}
        free = [parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize]
        self._free = [name for name in free if type(arguments[name]) is int]
        others = [n for n in arguments if n not in self._tensors and n not in self._descriptors and n not in self._free]
        self._others = itemgetter(*others)
        self._numbers = self._others(arguments)
        self.can_be_repeated = self._has_alike(arguments)

    def run(self, launch: Launch) -> bool:
        """Whether `launch` is like this one, and has been run."""
        arguments = {**launch.arguments, **self._told}
        if self._others(arguments) != self._numbers or self._setting != _setting(launch):
            return False
        if not self._has_alike(arguments):
            return False
        self._compiled[(*launch.grid, 1, 1)[:3]](*self._all(arguments))
        return True

    def _has_alike(self, arguments: Arguments) -> bool:
        """Tensors and free numbers: addresses that 16 divides, numbers of 32 bits."""
        for name, dtype in self._tensors.items():
            value = arguments[name]
            if not isinstance(value, Tensor) or value.dtype is not dtype or value.data_ptr() % _ALIGNMENT:
                return False
        return all(_shape(arguments[name]) == shape for name, shape in self._descriptors.items()) and all(
            _LEAST <= arguments[name] <= _MOST for name in self._free
        )


def _setting(launch: Launch) -> tuple[int, int, int]:
    return launch.num_warps, launch.num_stages, torch.cuda.current_device()


def _shape(descriptor: TensorDescriptor) -> tuple[Any, ...]:
    return descriptor.base.dtype, descriptor.block_shape, descriptor.layout
