"""What 16 bits cost, for a model that has learned something: the one in the box, beside transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import demo_model
from engine.attention import Span
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, load_model
from tests.checkpoints import greedy
from tests.engine.driver import DEVICE, attention_over

_CHECKPOINT = Path(demo_model.__file__).with_name("checkpoint")
_PROMPT, _ANSWER = 60, 60


@torch.inference_mode()
def _log_probs(model: LoadedModel, tokens: list[int]) -> Tensor:
    """`[len(tokens), vocab_size]`: the prompt as a chunk, the answer token by token."""
    cache = KVCache(model.kv_layout(16), -(-len(tokens) // 16), DEVICE)
    tables = torch.arange(cache.num_blocks, dtype=torch.int32)[None].numpy()
    attention, logits = attention_over(model, cache, tables), []
    for start, count in [(0, _PROMPT), *((at, 1) for at in range(_PROMPT, len(tokens)))]:
        span = Span(0, start, count, slot=0)
        positions = torch.arange(start, span.end, device=DEVICE)
        hidden = model.decoder.forward(
            torch.tensor(tokens[start : span.end], device=DEVICE), positions, attention.batch([span])
        )
        logits.append(model.decoder.logits(hidden).float().cpu())
    return torch.cat(logits).log_softmax(dim=-1)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_in_bfloat16_stay_near_those_of_float32(seed: int) -> None:
    """Of the answer's tokens, within 2e-2 on average; of all tokens, no farther off than transformers in bfloat16."""
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(_CHECKPOINT, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    vocab_size = exact.config.vocab_size
    prompt = torch.randint(5, vocab_size, (_PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = prompt + greedy(exact, prompt, _ANSWER)
    wanted, theirs = (model(torch.tensor([tokens])).logits[0].float().log_softmax(-1) for model in (exact, rounded))
    answering = slice(_PROMPT - 1, -1)
    off = (_log_probs(load_model(str(_CHECKPOINT), "bfloat16", DEVICE), tokens) - wanted)[answering].abs()
    chosen = off.gather(1, torch.tensor(tokens[_PROMPT:])[:, None])
    assert chosen.mean() < 2e-2
    assert off.mean() < 1.1 * (theirs - wanted)[answering].abs().mean()
