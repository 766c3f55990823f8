"""The tokenizer: byte-level BPE, trained on the generator's own text. Owns the form of a chat.

Digits are grouped in pairs and never join a word or a space, so that a code is the same two tokens wherever it stands.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.tasks import KINDS, draw, facts, filler

VOCAB_SIZE = 1536
BOS, END, SYSTEM, USER, ASSISTANT, PAD = SPECIAL = (
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|pad|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PAIRS = 200
"""How often every pair of digits is shown to the tokenizer, so that each becomes one token, "00" to "09" too."""
_PATTERN = r"\d{1,2}| ?\p{L}+| ?[^\s\p{L}\d]+|\s"


def train_tokenizer(directory: Path, seed: int, samples: int = 20_000) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json and its settings. The same seed gives the same files."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    pairs = " ".join(f"{pair:02}" for pair in range(100))
    tokenizer.train_from_iterator([pairs] * _PAIRS + [_text(rng) for _ in range(samples)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return fast


def _text(rng: random.Random) -> str:
    kind = rng.choice(KINDS)
    if kind == "recall":
        return " ".join([fact.tell() + " " + fact.ask(rng) for fact in facts(rng, 4)] + [filler(rng)] * 4)
    turn = draw(kind, rng, hold_out=False)
    return f"{turn.prompt}\n{turn.answer}"
