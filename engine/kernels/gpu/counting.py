"""How often a request has generated each token, kept on the device for those that have penalties."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.sampling_rows import has_penalty, slot_of
from engine.kernels.gpu.sampling_table import WORDS, SamplingTensors

_WORDS = tl.constexpr(WORDS)


def count_tokens(params: SamplingTensors, token_ids: Tensor) -> None:
    """Counts one token a row, `[num_rows]`, in `params.counts`, where the row has a penalty."""
    if params.counts is None:
        return
    arguments = {
        "table": params.table,
        "counts": params.counts,
        "token_ids": token_ids,
        "counts_stride": params.counts.stride(0),
    }
    Launch(count_drawn, (params.num_rows,), arguments, 1).run()


@triton.jit
def count_drawn(table: tl.tensor, counts: tl.tensor, token_ids: tl.tensor, counts_stride: tl.tensor) -> None:
    """A program: one row."""
    row = tl.program_id(0).to(tl.int64)
    params = table + row * _WORDS
    if has_penalty(params):
        at = counts + slot_of(params) * counts_stride + tl.load(token_ids + row).to(tl.int64)
        tl.store(at, tl.load(at) + 1)
