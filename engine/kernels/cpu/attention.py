"""Attention by the compiled kernel, for pools in host memory: an AttentionBatch that passes addresses to attention.c.

What a step costs in Python does not grow with the context: the kernel reads the block tables where the runner keeps
them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.layout import KVLayout
from engine.attention import BlockTables, HeadNorms, Rotary, Span
from engine.kernels.cpu.library import DTYPES, Batch, Kernel
from engine.kv_cache import KVCache

_MAX_HEAD_DIM = 256

Rows = npt.NDArray[np.int32]
"""`[num_spans, 4]`: row, start, count, slot."""


class CompiledAttention:
    def __init__(self, kernel: Kernel, cache: KVCache, block_tables: BlockTables) -> None:
        layout = cache.layout
        assert self.supports(layout), f"{layout} is not for this kernel"
        assert cache.device.type == "cpu", f"the pool is on {cache.device}"
        assert block_tables.dtype == np.int32, f"block tables of {block_tables.dtype}"
        assert block_tables.flags.c_contiguous, "block tables lie apart"
        self.kernel, self.cache = kernel, cache
        self._block_tables = block_tables  # kept: the kernel has their address
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._constant = {
            "pool": cache.tensor.data_ptr(),
            "tables": block_tables.ctypes.data,
            "table_stride": block_tables.strides[0] // 4,
            "num_layers": layout.num_layers,
            "num_kv_heads": layout.num_kv_heads,
            "block_size": layout.block_size,
            "head_dim": layout.head_dim,
            "dtype": DTYPES.index(layout.dtype),
            "isa": int(kernel.isa),
        }

    @staticmethod
    def supports(layout: KVLayout) -> bool:
        return layout.dtype in DTYPES and layout.head_dim % 16 == 0 and 0 < layout.head_dim <= _MAX_HEAD_DIM

    def batch(self, spans: Sequence[Span]) -> CompiledBatch:
        return CompiledBatch(self, spans)

    def struct(self, rows: Rows) -> Batch:
        """Good for as long as `rows` is kept."""
        return Batch(
            spans=rows.ctypes.data,
            num_spans=len(rows),
            num_tokens=int(rows[-1, 0] + rows[-1, 2]) if len(rows) else 0,
            team=self.kernel.team(),
            **self._constant,
        )

    def workspace(self, needed: int) -> int:
        """Address of at least so many bytes, good until the next call."""
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        return self._workspace.data_ptr()


class CompiledBatch:
    def __init__(self, attention: CompiledAttention, spans: Sequence[Span]) -> None:
        self._attention, self._library = attention, attention.kernel.library
        rows = np.array([(s.row, s.start, s.count, s.slot) for s in spans], dtype=np.int32).reshape(-1, 4)
        self._kept = rows  # the struct has its address
        self._batch = ctypes.byref(attention.struct(rows))
        self._needed: dict[int, int] = {}  # bytes of workspace, by window
        self._output: Tensor | None = None
        layout = attention.cache.layout
        self._head_dim, self._num_kv_heads = layout.head_dim, layout.num_kv_heads

    def rotate_and_write(self, layer: int, qkv: Tensor, rotary: Rotary, norms: HeadNorms | None) -> Tensor:
        """In place: the query is a view of `qkv`."""
        assert qkv.dtype is self._attention.cache.tensor.dtype, f"{qkv.dtype} for {self._attention.cache.tensor.dtype}"
        assert rotary.cos.is_contiguous(), "angles lie apart"
        heads = qkv.view(len(qkv), -1, self._head_dim)
        num_heads = heads.shape[1] - 2 * self._num_kv_heads
        self._library.baton_rotate_and_write(
            self._batch,
            layer,
            num_heads,
            qkv.data_ptr(),
            qkv.stride(0),
            rotary.cos.data_ptr(),
            rotary.sin.data_ptr(),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            0.0 if norms is None else norms.eps,
        )
        return heads[:, :num_heads]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        key, value = self._rows_of_heads(key), self._rows_of_heads(value)
        self._library.baton_write(self._batch, layer, key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0))

    def attend(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        num_tokens, num_heads, head_dim = query.shape
        if self._output is None or self._output.shape != query.shape:
            self._output = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype)
        output = self._output
        query, batch, seen = self._rows_of_heads(query), self._batch, window or 0
        if seen not in self._needed:
            self._needed[seen] = self._library.baton_attend_workspace(batch, seen, num_heads)
        self._library.baton_attend(
            batch,
            layer,
            seen,
            num_heads,
            head_dim**-0.5,
            query.data_ptr(),
            query.stride(0),
            output.data_ptr(),
            self._attention.workspace(self._needed[seen]),
        )
        return output.view(num_tokens, num_heads * head_dim)

    def _rows_of_heads(self, x: Tensor) -> Tensor:
        """`x`, with a token's heads behind each other; tokens may be apart."""
        assert x.dtype is self._attention.cache.tensor.dtype, (
            f"{x.dtype} for a pool of {self._attention.cache.tensor.dtype}"
        )
        return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
