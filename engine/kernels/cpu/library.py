"""Loads the compiled kernels and lends them torch's threads: a second pool in the process would spin against them."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

from engine.kernels.cpu import build

log = logging.getLogger(__name__)

_OPENMP = ("libgomp", "libomp", "libiomp5")  # each of them has GOMP_parallel

DTYPES = ("float32", "bfloat16", "float16")
"""By common.h's numbers."""


class Isa(IntEnum):
    """As in common.h; each includes those before it."""

    GENERIC = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


class Team(ctypes.Structure):
    """common.h's Team."""

    _fields_ = (("threads", ctypes.c_int64), ("parallel", ctypes.c_void_p))


class Setting(ctypes.Structure):
    """elementwise.c's Setting."""

    _fields_ = (("dtype", ctypes.c_int64), ("isa", ctypes.c_int64), ("team", Team))


class Batch(ctypes.Structure):
    """batch.h's Batch."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_spans", "num_tokens", "num_layers", "num_kv_heads")),
        *((name, ctypes.c_int64) for name in ("block_size", "head_dim", "dtype", "isa")),
        ("team", Team),
    )


class Weight(ctypes.Structure):
    """linear.c's Weight."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "dtype", "isa", "gated")),
    )


@dataclass(frozen=True)
class Kernel:
    library: ctypes.CDLL
    isa: Isa
    """What it will use; the best that the machine has, unless a test asks for less."""
    parallel: int
    """Address of GOMP_parallel in torch's own OpenMP runtime."""

    def team(self) -> Team:
        """As many threads as torch's own operations have now."""
        return Team(torch.get_num_threads(), self.parallel)

    def with_isa(self, isa: Isa) -> Kernel:
        assert isa <= self.isa, f"{isa.name} on a machine that has {self.isa.name}"
        return replace(self, isa=isa)


@cache
def load_kernel() -> Kernel | None:
    """None, with one line in the log that says why, where it can't be had."""
    try:
        path = build.find_or_compile()
        kernel = load_library(path)
    except (build.BuildError, OSError) as error:
        log.warning("%s; torch's operations are used instead, which are slower", error)
        return None
    log.info("CPU kernels %s, %s", path.name, kernel.isa.name)
    return kernel


def load_library(path: Path) -> Kernel:
    """Raises OSError where it can't be loaded, or torch brings no OpenMP that it could share."""
    parallel = ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p).value
    assert parallel is not None
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.baton_best_isa.restype = number
    for name, arguments in {
        "baton_add_norm": [pointer, pointer, pointer, pointer, pointer, number, number, ctypes.c_float],
        "baton_gate": [pointer, pointer, pointer, number, number],
        "baton_write": [pointer, number, pointer, number, pointer, number],
        "baton_rotate_and_write": [pointer, number, number, pointer, number, *[pointer] * 4, ctypes.c_float],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.baton_attend_workspace.argtypes = [pointer, number, number]
    library.baton_attend_workspace.restype = number
    library.baton_attend.argtypes = [pointer, number, number, number, ctypes.c_float, pointer, number, pointer, pointer]
    library.baton_attend.restype = None
    library.baton_draw_workspace.argtypes = [number, number]
    library.baton_draw_workspace.restype = number
    library.baton_draw.argtypes = [pointer]
    library.baton_draw.restype = None
    library.baton_words.argtypes = [number, ctypes.c_uint64, ctypes.c_uint64, number, pointer]
    library.baton_words.restype = number
    isa = Isa(library.baton_best_isa())
    library.baton_copy_least.restype = number
    pool = (pointer, number)
    library.baton_copy_and_sum.argtypes = [*pool, *pool, number, pointer, number, pointer, number]
    library.baton_copy_and_sum.restype = number
    library.baton_has_f16c.restype = number
    if isa >= Isa.AVX2:
        library.baton_linear.argtypes = [pointer, pointer, pointer, number, number, pointer]
        library.baton_linear.restype = None
        library.baton_linear_packed_size.argtypes = [pointer]
        library.baton_linear_packed_size.restype = number
        library.baton_linear_pack.argtypes = [pointer, pointer, pointer]
        library.baton_linear_pack.restype = None
        library.baton_linear_unpack.argtypes = [pointer, pointer, pointer, number, pointer]
        library.baton_linear_unpack.restype = number
    return Kernel(library, isa, parallel)


def _openmp() -> ctypes.CDLL:
    """The OpenMP runtime that torch uses: among those mapped into the process, torch's own before any other."""
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    found = [path for path in sorted(mapped) if Path(path).name.startswith(_OPENMP)]
    ours = str(Path(torch.__file__).parent)
    found.sort(key=lambda path: not path.startswith(ours))
    if not found:
        raise OSError(
            f"torch {torch.__version__} has loaded no OpenMP runtime ({', '.join(_OPENMP)}) to share threads of"
        )
    return ctypes.CDLL(found[0])
