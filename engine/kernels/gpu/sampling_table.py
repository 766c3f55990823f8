"""What a draw on a device depends on besides the logits: a table of one row a draw, in device memory at a fixed
address, that the host or other kernels fill between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.sampling import SamplingParams
from engine.sampler import LEAST_TEMPERATURE, Draw

WORDS = 16
"""32-bit words of a row: one 64-byte piece of memory."""
SEED, POSITION, BANNED_UNTIL, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, SLOT, NUM_BANNED = (
    0, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14
)  # fmt: skip
"""Which words: the first three numbers are of two words, the low half first."""
IN_PROMPT = 1 << 30
"""Added to a count of generated tokens: the prompt has this token."""

_FIELDS = {
    "seed": (SEED, "u8"),
    "position": (POSITION, "i8"),
    "banned_until": (BANNED_UNTIL, "i8"),
    "temperature": (TEMPERATURE, "f4"),
    "top_k": (TOP_K, "i4"),
    "top_p": (TOP_P, "f4"),
    "repetition": (REPETITION, "f4"),
    "num_banned": (NUM_BANNED, "i4"),
}
ROW = np.dtype(
    {
        "names": list(_FIELDS),
        "formats": [form for _, form in _FIELDS.values()],
        "offsets": [4 * word for word, _ in _FIELDS.values()],
        "itemsize": 4 * WORDS,
    }
)
"""Of a row what requests can ask for so far; the rest is 0."""
_ALWAYS = 2**63 - 1
Rows = npt.NDArray[np.void]
"""Rows of a table in host memory."""


@dataclass(frozen=True)
class SamplingTensors:
    """Parameters of `num_rows` draws. All tensors but `banned` and `counts` are views of `table`."""

    table: Tensor
    """`[num_rows, WORDS]` int32."""
    banned: Tensor
    """`[num_rows, max_banned]` int32: of each row the first `num_banned` are not drawn, at positions below
    `banned_until`."""
    counts: Tensor | None = None
    """`[num_slots, vocab_size]` int32: how often a request has generated each token, plus IN_PROMPT where its prompt
    has it. Read only for rows with a penalty; without it there are none."""

    @staticmethod
    def neutral(
        num_rows: int, device: torch.device | str, max_banned: int = 0, counts: Tensor | None = None
    ) -> SamplingTensors:
        """Greedy rows without limits, penalties or banned tokens."""
        table = torch.zeros((num_rows, WORDS), dtype=torch.int32, device=device)
        banned = torch.zeros((num_rows, max_banned), dtype=torch.int32, device=device)
        tensors = SamplingTensors(table, banned, counts)
        tensors.banned_until.fill_(_ALWAYS)
        tensors.top_p.fill_(1)
        tensors.repetition.fill_(1)
        return tensors

    @staticmethod
    def of(draws: Sequence[Draw], eos_token_ids: Sequence[int], device: torch.device | str) -> SamplingTensors:
        """What `draws` say, copied to the device."""
        rows = np.zeros(len(draws), dtype=ROW)
        banned = [draw.banned(eos_token_ids) for draw in draws]
        for row, draw, tokens in zip(rows, draws, banned, strict=True):
            put_params(row, draw.params)
            row["position"], row["num_banned"] = draw.position, len(tokens)
        ids = np.zeros((len(draws), max(map(len, banned), default=0)), dtype=np.int32)
        for row_of_ids, tokens in zip(ids, banned, strict=True):
            row_of_ids[: len(tokens)] = tokens
        return SamplingTensors(table_of(rows).to(device), torch.from_numpy(ids).to(device))

    @property
    def seed(self) -> Tensor:
        """int64: a seed's 64 bits are those of its two's complement."""
        return self.table.view(torch.int64)[:, SEED // 2]

    @property
    def position(self) -> Tensor:
        """int64: of the token to draw, from the prompt's first token on."""
        return self.table.view(torch.int64)[:, POSITION // 2]

    @property
    def banned_until(self) -> Tensor:
        """int64: the first position where banned tokens may be drawn."""
        return self.table.view(torch.int64)[:, BANNED_UNTIL // 2]

    @property
    def temperature(self) -> Tensor:
        """float32: 0 is greedy, others at least LEAST_TEMPERATURE."""
        return self._floats(TEMPERATURE)

    @property
    def top_k(self) -> Tensor:
        """int32: 0, or the size of the vocabulary and more: all."""
        return self.table[:, TOP_K]

    @property
    def top_p(self) -> Tensor:
        """float32: 1: all."""
        return self._floats(TOP_P)

    @property
    def min_p(self) -> Tensor:
        """float32: least probability, as a part of the best token's; 0: all."""
        return self._floats(MIN_P)

    @property
    def repetition(self) -> Tensor:
        """float32, 1 is none: positive logits of tokens that the request has, in prompt or answer, are divided by it,
        others multiplied."""
        return self._floats(REPETITION)

    @property
    def presence(self) -> Tensor:
        """float32: subtracted from logits of tokens that the answer has."""
        return self._floats(PRESENCE)

    @property
    def frequency(self) -> Tensor:
        """float32: subtracted from a logit for each time that the answer has the token."""
        return self._floats(FREQUENCY)

    @property
    def slot(self) -> Tensor:
        """int32: row of `counts`."""
        return self.table[:, SLOT]

    @property
    def num_banned(self) -> Tensor:
        """int32."""
        return self.table[:, NUM_BANNED]

    @property
    def num_rows(self) -> int:
        return self.table.shape[0]

    def _floats(self, word: int) -> Tensor:
        return self.table.view(torch.float32)[:, word]


def put_params(row: np.void, params: SamplingParams) -> None:
    assert params.greedy or params.seed is not None, f"no seed for temperature {params.temperature}"
    row["seed"], row["banned_until"] = params.seed or 0, _ALWAYS
    row["temperature"] = 0 if params.greedy else max(params.temperature, LEAST_TEMPERATURE)
    row["top_k"], row["top_p"], row["repetition"] = params.top_k, params.top_p, 1


def table_of(rows: Rows) -> Tensor:
    """`[num_rows, WORDS]` int32, in host memory."""
    return torch.from_numpy(rows.view(np.int32).reshape(len(rows), WORDS))
