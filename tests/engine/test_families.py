"""Each family computes what transformers computes, whatever the chunks, the block tables and the company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention import Span
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, load_model
from tests.checkpoints import FAMILIES, VOCAB_SIZE, build_checkpoint, build_model, edit_json, greedy
from tests.engine.driver import DEVICE, Driver, attention_over


def _prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.inference_mode()
def _logits(model: LoadedModel, prompt: list[int]) -> torch.Tensor:
    device = model.decoder.device
    cache = KVCache(model.kv_layout(16), -(-len(prompt) // 16), device)
    block_tables = torch.arange(cache.num_blocks, dtype=torch.int32)[None].numpy()
    batch = attention_over(model, cache, block_tables).batch([Span(0, 0, len(prompt), slot=0)])
    hidden = model.decoder.forward(torch.tensor(prompt, device=device), torch.arange(len(prompt), device=device), batch)
    return model.decoder.logits(hidden).cpu()


@torch.inference_mode()
def _oracle_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, loaded: Callable[[str], LoadedModel]) -> None:
    prompt = _prompts(1, 1)[0] + list(range(100))
    torch.testing.assert_close(
        _logits(loaded(family), prompt), _oracle_logits(build_model(family), prompt), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_in_mixed_batches(family: str, loaded: Callable[[str], LoadedModel]) -> None:
    oracle, prompts = build_model(family), _prompts(8, 150)
    expected = [greedy(oracle, prompt, 12) for prompt in prompts]
    assert Driver(loaded(family), seed=1).generate(prompts, 12) == expected
    assert Driver(loaded(family), seed=2, block_size=16).generate(prompts, 12, preempt=True) == expected


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": False, "use_sliding_window": False}),
        ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 1}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
        ("mistral", {"sliding_window": None, "head_dim": None}),
    ],
)
def test_variants_of_a_family_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(str(build_checkpoint(family, tmp_path, tokenizer=False, **overrides)), device=DEVICE)
    oracle, prompts = build_model(family, **overrides), _prompts(3, 80, seed=3)
    assert Driver(model).generate(prompts, 6) == [greedy(oracle, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_sliding_window_of_the_test_checkpoints_matters(
    family: str, loaded: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    """Were the window ignored, the tests above would notice."""
    windowless = {"sliding_window": None} if family == "mistral" else {"use_sliding_window": False}
    wide = load_model(str(build_checkpoint(family, tmp_path, tokenizer=False, **windowless)), device=DEVICE)
    assert None not in loaded(family).spec.windows[1:]
    prompt = list(range(60))
    assert not torch.allclose(_logits(loaded(family), prompt)[-1], _logits(wide, prompt)[-1], atol=1e-2)
    short = list(range(19))  # the window's first 19 tokens see all
    torch.testing.assert_close(_logits(loaded(family), short), _logits(wide, short))


def test_qwen2_layers_below_max_window_layers_see_everything(loaded: Callable[[str], LoadedModel]) -> None:
    assert loaded("qwen2").spec.windows == (None, 24, 24)


def test_rope_settings_of_older_configs_mean_the_same(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling where transformers 5 writes rope_parameters."""
    path = build_checkpoint("llama", tmp_path, tokenizer=False)
    new = load_model(str(path)).spec
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    edit_json(path / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    assert load_model(str(path)).spec == new
    edit_json(path / "config.json", rope_theta=500.0)
    assert load_model(str(path)).spec.rope == replace(new.rope, theta=500.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_16_bit_weights_give_the_logits_of_transformers_up_to_rounding(
    family: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    model = load_model(str(build_checkpoint(family, tmp_path, dtype=dtype, tokenizer=False)), device=DEVICE)
    prompt = list(range(50))
    oracle = _oracle_logits(build_model(family).to(dtype=dtype).to(dtype=torch.float32), prompt)
    error = (_logits(model, prompt) - oracle).abs().mean() / oracle.abs().mean()
    assert model.dtype == str(dtype).removeprefix("torch.")
    assert error < tolerance
