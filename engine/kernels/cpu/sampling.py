"""Tokens by the compiled sampler, from logits in host memory: a Sampler that passes addresses to sampling.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.cpu.library import Kernel, Team
from engine.sampler import LEAST_TEMPERATURE, Draw

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by common.h's numbers

_PARAMS = np.dtype([("seed", "u8"), ("position", "u8"), ("temperature", "f4"), ("top_p", "f4"), ("top_k", "i8")])
"""sampling.c's Params."""
_GREEDY = (0, 0, 0.0, 1.0, 0)


class Drawing(ctypes.Structure):
    """sampling.c's Drawing."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "rows", "vocab_size", "dtype", "isa")),
        ("params", ctypes.c_void_p),
        ("banned", ctypes.c_void_p),
        ("num_banned", ctypes.c_int64),
        ("maxima", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("team", Team),
    )


class CompiledSampler:
    def __init__(self, kernel: Kernel, eos_token_ids: Sequence[int]) -> None:
        self._kernel = kernel
        self._eos_token_ids = tuple(eos_token_ids)
        self._workspace = np.empty(0, dtype=np.float32)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        assert logits.device.type == "cpu", f"logits on {logits.device}"
        assert logits.dtype in _DTYPES, f"logits of {logits.dtype}"
        assert logits.shape[0] == len(draws), f"{logits.shape[0]} rows for {len(draws)} draws"
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        rows, vocab_size = logits.shape
        params = self._params(draws)
        banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned(self._eos_token_ids)]
        banned_array = np.array(banned, dtype=np.int32)
        tokens = np.empty(rows, dtype=np.int64)
        needed = self._kernel.library.baton_draw_workspace(rows, vocab_size)
        if len(self._workspace) < needed:
            self._workspace = np.empty(needed, dtype=np.float32)
        drawing = Drawing(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            rows=rows,
            vocab_size=vocab_size,
            dtype=_DTYPES.index(logits.dtype),
            isa=int(self._kernel.isa),
            params=None if params is None else params.ctypes.data,
            banned=banned_array.ctypes.data,
            num_banned=len(banned),
            maxima=self._workspace.ctypes.data,
            tokens=tokens.ctypes.data,
            team=self._kernel.team(),
        )
        self._kernel.library.baton_draw(ctypes.byref(drawing))
        token_ids: list[int] = tokens.tolist()
        return token_ids

    @staticmethod
    def _params(draws: Sequence[Draw]) -> npt.NDArray[np.void] | None:
        """One a row; None if all are greedy."""
        if all(draw.params.greedy for draw in draws):
            return None
        return np.array([_GREEDY if draw.params.greedy else _row(draw) for draw in draws], dtype=_PARAMS)


def _row(draw: Draw) -> tuple[int, int, float, float, int]:
    params = draw.params
    assert params.seed is not None, f"no seed for temperature {params.temperature}"
    return (params.seed, draw.position, max(params.temperature, LEAST_TEMPERATURE), params.top_p, params.top_k)
