"""vLLM as a peer, run by the Python that has it: one JSON line of jobs in, one line with the seconds they took out.

    peer_vllm.py MODEL_DIRECTORY MAX_NUM_SEQS MAX_NUM_BATCHED_TOKENS

Jobs are `{"prompts": [[id, …], …], "max_tokens": [n, …]}`. Lines of ours begin with PEER: vLLM writes to stdout too.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams, __version__


def main() -> None:
    model, max_num_seqs, max_num_batched_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        disable_log_stats=True,
    )
    print("PEER " + json.dumps({"name": f"vllm {__version__}"}), flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        sampling = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in jobs["max_tokens"]
        ]
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in jobs["prompts"]], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        generated = [len(output.outputs[0].token_ids) for output in outputs]
        assert generated == jobs["max_tokens"], f"generated {generated} tokens, asked for {jobs['max_tokens']}"
        print("PEER " + json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
