"""vLLM, offline. Options are arguments of `LLM`, such as enforce_eager=true or max_num_batched_tokens=4096; kv_gib is
the size of its KV pool.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from bench.peers.protocol import serve, settings

_OURS = ("model", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")


def main() -> None:
    given = settings()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(given.options.pop("kv_gib", 4))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{given.threads - 1}"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams, __version__

    arguments: dict[str, Any] = {name: asdict(given)[name] for name in _OURS} | given.options
    llm = LLM(**arguments, skip_tokenizer_init=True, disable_log_stats=True)

    def run(prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        sampling = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in max_tokens
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    serve(f"vllm {__version__}", run)


if __name__ == "__main__":
    main()
