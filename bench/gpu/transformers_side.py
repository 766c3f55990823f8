"""transformers on the same GPU with random weights of the same shape: `generate` one by one, and its continuous
batching."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from bench.figures import Figure
from bench.gpu.steps import REQUESTS, requests_measure
from bench.workloads import totals, w1
from engine.models.spec import ModelSpec

_ONE_BY_ONE = 3
_TOGETHER = 192
"""Requests that each is given, the first of the load: all of them would take minutes."""
_SALT = 1 << 42


def figures(spec: ModelSpec) -> Iterator[Figure]:
    model = _model(spec)
    yield _figure("transformers, one by one", _one_by_one(model))
    try:
        yield _figure("transformers, continuous batching", _continuous(model))
    except Exception as error:  # whatever stops it is not ours to mend: the table has no such column then
        print(f"transformers' continuous batching failed: {type(error).__name__}: {error}", flush=True)


def _figure(side: str, rate: float) -> Figure:
    return Figure(requests_measure(), "all", side, "tok/s", (rate,), more_is_better=True)


def _model(spec: ModelSpec) -> Any:
    kind: Any = transformers.CONFIG_MAPPING[spec.family]
    config = kind(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_model_len,
        tie_word_embeddings=spec.tied_embeddings,
    )
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


def _generation(count: int) -> Any:
    return transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0, eos_token_id=None
    )


@torch.inference_mode()
def _one_by_one(model: Any) -> float:
    """Tokens a second, of the first requests: each would take seconds."""
    jobs = w1(model.config.vocab_size, _SALT, num_requests=REQUESTS)[: _ONE_BY_ONE + 1]
    for index, job in enumerate(jobs):
        if index == 1:  # behind one that sets things up
            torch.cuda.synchronize()
            started = time.perf_counter()
        prompt = torch.tensor([job.prompt], device="cuda")
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=_generation(job.max_tokens))
    torch.cuda.synchronize()
    return totals(jobs[1:])[1] / (time.perf_counter() - started)


def _continuous(model: Any) -> float:
    """Tokens a second, once it has warmed up."""
    jobs = w1(model.config.vocab_size, _SALT, num_requests=REQUESTS)[:_TOGETHER]
    generation = _generation(max(job.max_tokens for job in jobs))
    generation.min_new_tokens = None
    with model.continuous_batching_context_manager(generation_config=generation, block=True, timeout=5) as manager:
        started = time.perf_counter()
        for job in jobs:
            manager.add_request(job.prompt, max_new_tokens=job.max_tokens)
        generated = done = 0
        while done < len(jobs):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done += 1
                generated += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError(f"it ended with {done} of {len(jobs)} requests done")
        return generated / (time.perf_counter() - started)
