"""The model that figures are quoted for: `python -m bench.models DIRECTORY` makes it. The shape of Qwen2.5-0.5B with a
vocabulary of 32,000, random, bfloat16, with a tokenizer, so that it can be served. The same files every time, for one
version of Python: the tokenizer learns from the standard library's sources.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 32000
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}


def half_billion(path: Path) -> Path:
    """Writes the checkpoint (0.8 GB) to `path` unless it is there."""
    if (path / "tokenizer.json").exists():  # written last
        return path
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.bfloat16().save_pretrained(path)
    tokenizer(VOCAB_SIZE, sources(Path(sysconfig.get_paths()["stdlib"]))).save_pretrained(path)
    return path


def tokenizer(vocab_size: int, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Every id below `vocab_size` has a text, so that no generated token is invisible to a client."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learned.train_from_iterator(texts, trainer)
    if learned.get_vocab_size() != vocab_size:
        raise SystemExit(f"the texts gave {learned.get_vocab_size()} words; {vocab_size} are needed")
    unk, bos, eos, pad = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template="{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


def sources(root: Path) -> Iterator[str]:
    """Of Python under `root`, in one order, without what was installed there later."""
    for path in sorted(root.rglob("*.py")):
        if _FOREIGN.isdisjoint(path.relative_to(root).parts):
            yield path.read_text(errors="replace")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("directory", type=Path, help="where it is written to, unless it is there")
    print(half_billion(parser.parse_args().directory))
