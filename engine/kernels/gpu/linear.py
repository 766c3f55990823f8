"""Matrix products of few rows, as decodes have them: limited by the reading of the weights, and by nothing else.

Programs share out columns of the result and, where these are few, the depth. Those that share columns leave partial
sums, and the last of them adds all up, always in the same order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu.launch import Launch
from engine.kernels.gpu.overlap import take_turn

MAX_ROWS = 16
"""More are quicker with torch's product, and tl.dot multiplies no fewer."""
_DTYPES = (torch.bfloat16, torch.float16)

# Launch parameters. PROGRAMS: so many have enough of the weights on their way. Memory gives 512 bytes in a row sooner
# than 256; fetching weights to the cache before the turn comes made every product slower (bench/results).
BLOCK_N, BLOCK_K, WARPS, STAGES = 64, 256, 8, 3
PROGRAMS, LEAST_CHUNKS = 132, 4


class TritonLinear:
    """Weight `[out_features, in_features]` as it is in the checkpoint."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        assert self.supports(weight), f"no kernel for weights of {weight.dtype} {tuple(weight.shape)}"
        self._weight, self._bias = weight, bias
        tiles = triton.cdiv(weight.shape[0], BLOCK_N)
        self._splits = choose_splits(tiles, triton.cdiv(weight.shape[1], BLOCK_K))
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=weight.device)
        """How many programs have left their partial sums; the last one makes it 0 again."""

    @staticmethod
    def supports(weight: Tensor) -> bool:
        return weight.dtype in _DTYPES and weight.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > MAX_ROWS:
            return F.linear(x, self._weight, self._bias)
        out = x.new_empty((len(x), len(self._weight)))
        self.launch(x, out).run()
        return out

    def launch(self, x: Tensor, out: Tensor) -> Launch:
        assert x.stride(1) == 1, "a row's values lie apart"
        features, depth = self._weight.shape
        tiles, splits = len(self._arrived), self._splits
        partials = torch.empty((splits if splits > 1 else 0, MAX_ROWS, features), dtype=torch.float32, device=x.device)
        arguments = {
            "x": x,
            "weight": self._weight,
            "bias": self._bias,
            "out": out,
            "partials": partials,
            "arrived": self._arrived,
            "num_rows": len(x),
            "features": features,
            "depth": depth,
            "x_stride": x.stride(0),
            "HAS_BIAS": self._bias is not None,
            "SPLITS": splits,
            "SPLIT_DEPTH": triton.cdiv(triton.cdiv(depth, BLOCK_K), splits) * BLOCK_K,
            "EVEN_N": features % BLOCK_N == 0,
            "EVEN_K": depth % (BLOCK_K * splits) == 0,
            "ROWS": MAX_ROWS,
            "BLOCK_N": BLOCK_N,
            "BLOCK_K": BLOCK_K,
        }
        return Launch(multiply_rows, (tiles, splits), arguments, WARPS, STAGES)


def choose_splits(tiles: int, chunks: int) -> int:
    """A power of two: as many as make enough programs, each of which has some chunks of the depth."""
    splits = 1
    while tiles * splits < PROGRAMS and chunks >= 2 * splits * LEAST_CHUNKS:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["num_rows"])
def multiply_rows(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partials: tl.tensor,
    arrived: tl.tensor,
    num_rows: tl.tensor,
    features: tl.tensor,
    depth: tl.tensor,
    x_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """A program: BLOCK_N columns of the result, over SPLIT_DEPTH of the depth."""
    take_turn(OVERLAPS)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, ROWS), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = (rows < num_rows)[:, None], (columns < features)[None, :]
    begin = split * SPLIT_DEPTH
    end = tl.minimum(begin + SPLIT_DEPTH, depth)
    weight_rows = weight + columns.to(tl.int64)[None, :] * depth
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            values = tl.load(x + rows[:, None] * x_stride + at[None, :], mask=is_row, other=0.0)
            if EVEN_N:
                weights = tl.load(weight_rows + at[:, None])
            else:
                weights = tl.load(weight_rows + at[:, None], mask=is_column, other=0.0)
        else:
            is_deep = at < end
            values = tl.load(x + rows[:, None] * x_stride + at[None, :], mask=is_row & is_deep[None, :], other=0.0)
            weights = tl.load(weight_rows + at[:, None], mask=is_column & is_deep[:, None], other=0.0)
        sums = tl.dot(values, weights, sums)

    to = rows[:, None] * features + columns[None, :]
    if SPLITS > 1:
        plane = ROWS * features
        tl.store(partials + split * plane + to, sums, mask=is_row & is_column)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for each in tl.static_range(SPLITS):
                # Past the multiprocessor's own cache, which does not know what others have written.
                sums += tl.load(partials + each * plane + to, mask=is_row & is_column, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    else:
        is_last = True
    if is_last:
        if HAS_BIAS:
            sums += tl.load(bias + columns, mask=columns < features, other=0.0).to(tl.float32)[None, :]
        tl.store(out + to, sums.to(out.dtype.element_ty), mask=is_row & is_column)
