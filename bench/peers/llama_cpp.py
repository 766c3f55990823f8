"""llama.cpp, through llama-cpp-python's C interface. Its servers' way of batching: each step takes one token of every
running sequence and fills the batch up with prompt tokens; the most likely token is picked here.

Options: gguf=FILE, made with `python -m bench.peers.gguf`; n_ubatch=512; unified=true for one KV buffer.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from bench.peers.protocol import Settings, serve, settings


class _Sequence:
    def __init__(self, prompt: list[int], wanted: int) -> None:
        self.prompt, self.wanted = prompt, wanted
        self.fed = 0
        """Prompt tokens in the cache."""
        self.generated: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.generated) == self.wanted


class _Batch:
    """llama.cpp's batch, filled anew each step."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.raw = llama_cpp.llama_batch_init(size, 0, 1)

    def clear(self) -> None:
        self.raw.n_tokens = 0

    def put(self, token: int, position: int, sequence: int, *, draw: bool) -> int:
        """The row."""
        row = int(self.raw.n_tokens)
        self.raw.token[row], self.raw.pos[row] = token, position
        self.raw.n_seq_id[row], self.raw.seq_id[row][0] = 1, sequence
        self.raw.logits[row] = draw
        self.raw.n_tokens = row + 1
        return row

    @property
    def full(self) -> bool:
        return bool(self.raw.n_tokens >= self.size)


class _LlamaCpp:
    def __init__(self, given: Settings) -> None:
        if "gguf" not in given.options:
            raise SystemExit("llama.cpp reads GGUF: give gguf=FILE, made with `python -m bench.peers.gguf MODEL FILE`")
        model = llama_cpp.llama_model_load_from_file(
            str(given.options["gguf"]).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise SystemExit(f"llama.cpp cannot load {given.options['gguf']}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = given.max_num_seqs
        parameters.n_ctx = given.max_model_len * given.max_num_seqs
        parameters.n_batch = given.max_num_batched_tokens
        parameters.n_ubatch = given.options.get("n_ubatch", 512)
        parameters.n_threads = parameters.n_threads_batch = given.threads
        parameters.kv_unified = bool(given.options.get("unified", False))
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise SystemExit("llama.cpp made no context; lower --max-model-len or --max-num-seqs")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = _Batch(given.max_num_batched_tokens)
        self._max_num_seqs = given.max_num_seqs

    def run(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        generated: list[int] = []
        for start in range(0, len(prompts), self._max_num_seqs):
            end = start + self._max_num_seqs
            generated += self._run_batch(prompts[start:end], max_tokens[start:end])
        return generated

    def _run_batch(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        llama_cpp.llama_memory_clear(self._memory, False)
        sequences = [_Sequence(*each) for each in zip(prompts, max_tokens, strict=True)]
        while not all(sequence.done for sequence in sequences):
            drawing = self._fill(sequences)
            status = llama_cpp.llama_decode(self._context, self._batch.raw)
            if status != 0:
                raise SystemExit(f"llama_decode failed with {status}")
            for number, row in drawing:
                logits = llama_cpp.llama_get_logits_ith(self._context, row)
                token = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
                sequences[number].generated.append(token)
                if sequences[number].done:
                    llama_cpp.llama_memory_seq_rm(self._memory, number, -1, -1)
        return [len(sequence.generated) for sequence in sequences]

    def _fill(self, sequences: list[_Sequence]) -> list[tuple[int, int]]:
        """Which sequences draw a token, and in which row."""
        batch, drawing = self._batch, []
        batch.clear()
        for number, sequence in enumerate(sequences):
            if sequence.generated and not sequence.done:
                position = len(sequence.prompt) + len(sequence.generated) - 1
                drawing.append((number, batch.put(sequence.generated[-1], position, number, draw=True)))
        for number, sequence in enumerate(sequences):
            while sequence.fed < len(sequence.prompt) and not batch.full:
                last = sequence.fed == len(sequence.prompt) - 1
                row = batch.put(sequence.prompt[sequence.fed], sequence.fed, number, draw=last)
                sequence.fed += 1
                if last:
                    drawing.append((number, row))
        return drawing


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # untyped, as all of llama_cpp
def _say_nothing(*_: Any) -> None:
    pass


def main() -> None:
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    serve(f"llama-cpp-python {llama_cpp.__version__}", _LlamaCpp(settings()).run)


if __name__ == "__main__":
    main()
