"""The dtypes that kernels are tested in: Triton's interpreter computes nonsense in bfloat16, without a word."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
