"""transformers' `generate`. Options: mode=single (one prompt after another) or mode=static (left-padded batches in the
order of the prompts, each until its longest is done; only tokens that were asked for count); batch=8 is their size;
attn=sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from bench.peers.protocol import serve, settings

_PAD = 0


def main() -> None:
    given = settings()
    mode = given.options.get("mode", "single")
    size = 1 if mode == "single" else int(given.options.get("batch", 8))
    torch.set_num_threads(given.threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        given.model, dtype=getattr(torch, given.dtype), attn_implementation=given.options.get("attn", "sdpa")
    ).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        generated: list[int] = []
        for start in range(0, len(prompts), size):
            part, counts = prompts[start : start + size], max_tokens[start : start + size]
            most = _generate(model, part, max(counts))
            generated += [min(count, most) for count in counts]
        return generated

    serve(f"transformers {transformers.__version__} {mode}", run)


def _generate(model: Any, prompts: list[list[int]], count: int) -> int:
    """How many tokens came for each."""
    width = max(map(len, prompts))
    token_ids = torch.full((len(prompts), width), _PAD)
    mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=_PAD, eos_token_id=None
    )
    output = model.generate(token_ids, attention_mask=mask, generation_config=config)
    return int(output.shape[1]) - width


if __name__ == "__main__":
    main()
